"""A process whose rows have no label makes as many forward passes as the others, or spread weights would hang."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version
from processes import free_port
from transformers import LlamaConfig, LlamaForCausalLM, __version__

TESTS = Path(__file__).parent
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.mark.slow
@pytest.mark.skipif(Version(__version__) < Version("5.20"), reason="distributed_config is in transformers >= 5.20")
def test_a_process_without_a_label_keeps_up(tmp_path):
    LlamaForCausalLM(LlamaConfig(vocab_size=30, num_key_value_heads=2, **SIZES)).save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    worker = [*command, str(TESTS / "unlabelled_worker.py"), str(tmp_path)]
    done = subprocess.run(worker, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    passes = [int((tmp_path / f"{rank}.txt").read_text()) for rank in range(2)]
    # Two a micro-batch, and three that find out what the loss is the mean of.
    assert passes == [15, 15]
