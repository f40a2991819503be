"""Train a config on one rank, and print after the log how many graphs torch.compile made, and how often it gave up.

    python graphs_worker.py CONFIG OVERRIDE...

A line of the output is JSON: [graphs, {reason of a graph break: how often}].

``tests/model/test_compiled.py`` starts it.
"""

from __future__ import annotations

import json
import sys

from torch._dynamo.utils import counters

from megachiar import pretrain

if __name__ == "__main__":
    config, *overrides = sys.argv[1:]
    code = pretrain.main(["--config", config, "--set", *overrides])
    print(json.dumps([counters["stats"]["unique_graphs"], dict(counters["graph_break"])]))
    sys.exit(code)
