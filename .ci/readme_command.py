"""Print one of the README's two commands, exactly as written there."""

import re
import sys
from pathlib import Path

wanted = {"explain": 0, "test": 1}[sys.argv[1]]
text = (Path(__file__).parent.parent / "README.md").read_text()
commands = re.findall(
    r"```(?:sh|bash|console)\n(python3 -m venv[^\n]+|[^\n]*pytest[^\n]*)\n```", text
)
print(commands[wanted])
