"""Write the JSON schema of a run's config, for editors that complete and check YAML.

python tools/config_schema.py > configs/schema.json
"""

from __future__ import annotations

import json

from megachiar.config import RunConfig
from megachiar.console import run


def main() -> None:
    schema = RunConfig.model_json_schema()
    print(json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=1))


if __name__ == "__main__":
    run(main)
