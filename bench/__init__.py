"""Side-by-side measurements of onnxplain, one JSON line a figure: `python -m bench`."""
