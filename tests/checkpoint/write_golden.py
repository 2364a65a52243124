"""Write the golden checkpoints of a release; run it once per format version, never to repair a test.

python -m tests.checkpoint.write_golden FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from esper.checkpoint.format.reader import read
from tests.checkpoint.killable import Training


def main(folder: str) -> None:
    run = Training(Path(folder), every=10**9, keep=None)
    facts = {}
    for until in (42, 63):
        run.train(until=until)
        name = run.manager.save({"loss": 0.5}, wait=True)
        found = read(run.manager.storage, name)
        weights = found.state["modules"][""]["state"]
        facts[name] = {
            "sums": {k: float(v.double().sum()) for k, v in weights.items()},
            "stages": [seed["stage"] for seed in json.loads(found.genome)["seeds"]],
            "index": run.batches.index,
        }
    run.manager.close()
    (Path(folder) / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    print({name: fact["stages"] for name, fact in facts.items()})


if __name__ == "__main__":
    main(sys.argv[1])
