"""Two attacked steps with the `fgm_trainer` that is installed, to prove a wheel in an environment of its own.

`python .ci/wheel_smoke.py FOLDER` also asserts that the package lies below FOLDER, and not in the source tree.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

import fgm_trainer
from fgm_trainer import AdversarialTrainer, AdversarialTrainingArguments
from fgm_trainer.attacks import ATTACKS

place = Path(fgm_trainer.__file__).resolve()
if len(sys.argv) > 1:
    assert place.is_relative_to(Path(sys.argv[1]).resolve()), place
assert (place.parent / "py.typed").is_file()

torch.manual_seed(0)
shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
model = BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=32, **shape))
data = [{"input_ids": [5 + (7 * i + j) % 40 for j in range(6)], "labels": i % 2} for i in range(16)]
with tempfile.TemporaryDirectory() as folder:
    args = AdversarialTrainingArguments(
        output_dir=folder,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        adv_epsilon=0.5,
        adv_warmup=0,
    )
    trainer = AdversarialTrainer(model=model, args=args, train_dataset=data)
    trainer.train()
moved = [line["adv_delta_norm"] for line in trainer.state.log_history if "adv_delta_norm" in line]
assert len(moved) == 2, moved
assert min(moved) > 0, moved
print(f"{fgm_trainer.__version__} of {place.parent}: {len(ATTACKS)} methods, embeddings moved by {moved}")
