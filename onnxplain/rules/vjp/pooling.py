"""pooling rules."""

from __future__ import annotations

from typing import Any

from onnxplain.graph.emit import Call, Emitter
from onnxplain.rules import RuleTable

TABLE = RuleTable("pooling")
rule = TABLE.rule
