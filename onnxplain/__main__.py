"""``python -m onnxplain`` is the command ``onnxplain``."""

from onnxplain.cli import main

main(prog_name="onnxplain")
