"""Perturbation: who is switched off, what "off" means, and how scores become attributions."""
