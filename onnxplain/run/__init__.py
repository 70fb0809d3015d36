"""Graph to results: sessions, providers, chunks, memory, device binding."""
