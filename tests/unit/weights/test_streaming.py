"""Weights larger than memory are written and read one tensor at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

#: A model of 379 MB whose tensors are made when they are asked for. The largest one has 38 MB.
PROGRAM = """
import json, sys, threading, time
from pathlib import Path
import torch
from swinv2_scale.models.factory import create_model
from swinv2_scale.weights.api import weights_of
from swinv2_scale.weights.facts import Facts
from swinv2_scale.weights.read import Weights, open_weights
from swinv2_scale.weights.write import write_weights

torch.set_num_threads(1)
fields = dict(embed_dim=384, depths=(1, 1, 3), num_heads=(12, 24, 48), image_size=64, window_size=4)
with torch.device("meta"):
    model = create_model("swinv2_tiny", **fields)
metas = dict(model.named_parameters())
settled = model.config.settled.model_dump(exclude={"attention"})
number = {name: 1.0 + place for place, name in enumerate(metas)}
source = Weights("made on demand", "native", Facts(settled), metas, lambda n: torch.full(metas[n].shape, number[n]), {})

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

def grown(work):
    global peak
    before = peak = anonymous()
    work()
    return peak - before

def read(path):
    found = open_weights(path)
    assert set(found.metas) == set(metas)
    for name in found.metas:
        assert torch.equal(found.tensor(name).aminmax().min, torch.tensor(number[name]))

threading.Thread(target=watch, daemon=True).start()
report = {"total": sum(meta.nbytes for meta in metas.values())}
for style, name in (("hf", "folder"), ("microsoft", "x.pth")):
    path = Path(sys.argv[1]) / name
    report["writing " + style] = grown(lambda: write_weights(source, path, style))
    report["reading " + style] = grown(lambda: read(path))
done = True
print(json.dumps(report))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_large_model_is_written_and_read_without_holding_a_copy_of_it(tmp_path: Path) -> None:
    """Memory that belongs to the process alone: mapped files are the system's to drop.

    Less than 120 MB of 379: the largest tensor has 38 MB, there may be what it was cut from or made into, and the one
    before it; half a copy of the model would be 190 MB. Hugging Face's folder, because queries, keys and values are cut
    and joined; a .pth file, because torch.save wants all tensors at once.
    """
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    grown = json.loads(finished.stdout.splitlines()[-1])
    assert grown.pop("total") > 370e6
    assert {what: num_bytes for what, num_bytes in grown.items() if num_bytes > 120e6} == {}
