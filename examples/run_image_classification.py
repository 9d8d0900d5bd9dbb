#!/usr/bin/env python
"""An image classifier trained plainly and adversarially, its pixels attacked: a table, a picture and all figures.

scikit-learn's digits by default, nothing is downloaded; Fashion-MNIST with `--dataset fashion-mnist`, its files from
Debian's package dataset-fashion-mnist.

Units: every epsilon (`--adv_epsilon`, `--test_epsilons`) is in the units of the tensor that the model sees, after
normalisation. A step of e in pixels from 0 to 1 is one of e / image_std there: with the default image_std of 0.5 an
epsilon of 0.2 is 0.1 in pixels. `--adv_clip` alone is in pixels before normalisation; the image
processor says what that is for the model.
"""

from __future__ import annotations

import copy
import gzip
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import versions
from torch import nn
from transformers import (
    HfArgumentParser,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
    set_seed,
)

from fgm_trainer import FGSM, PGD, AdversarialTrainer, AdversarialTrainingArguments, Attack, Noise, valid_range
from fgm_trainer.robustness import RobustnessReport, attack_batch, print_robustness

try:
    from transformers import ViTImageProcessorPil as ViTImageProcessor
except ImportError:  # transformers 4
    from transformers import ViTImageProcessor

MODELS = ("plain", "adversarial")
FASHION = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot")
# By data set: class names; side of an image; of a patch; training and test images by default.
DATASETS: dict[str, tuple[tuple[str, ...], int, int, int, int]] = {
    "digits": (tuple("0123456789"), 8, 2, 1297, 500),
    "fashion-mnist": (FASHION, 28, 7, 10_000, 1000),
}
IDX_FILES = {
    part: (f"{name}-images-idx3-ubyte.gz", f"{name}-labels-idx1-ubyte.gz")
    for part, name in (("train", "train"), ("test", "t10k"))
}


class DataError(Exception):
    """The images can't be read; the message says what to do."""


@dataclass
class ImageArguments:
    """Data, model and evaluation."""

    dataset: str = field(
        default="digits", metadata={"help": "Images: digits or fashion-mnist.", "choices": [*DATASETS]}
    )
    dataset_folder: str = field(
        default="/usr/share/datasets/fashion-mnist",
        metadata={"help": "Folder of Fashion-MNIST's four .gz files, where Debian's package puts them."},
    )
    train_samples: int | None = field(default=None, metadata={"help": "Training images, the first of the file."})
    test_samples: int | None = field(default=None, metadata={"help": "Test images, clean and under attack."})
    architecture: str = field(default="vit", metadata={"help": "vit or resnet.", "choices": ["vit", "resnet"]})
    hidden_size: int = field(default=48, metadata={"help": "Width of the vision transformer."})
    layers: int = field(default=2, metadata={"help": "Layers of the vision transformer."})
    image_mean: float = field(default=0.5, metadata={"help": "Of the image processor, in pixels from 0 to 1."})
    image_std: float = field(default=0.5, metadata={"help": "Of the image processor: an epsilon is in units of it."})
    test_epsilons: list[float] = field(
        default_factory=lambda: [0.1, 0.2, 0.4],
        metadata={"help": "Largest change of a value of the model's input in the evaluation, after normalisation."},
    )
    test_steps: int = field(default=20, metadata={"help": "Steps of PGD in the evaluation."})
    shown: int = field(default=6, metadata={"help": "Images in the picture."})


@dataclass
class Training(AdversarialTrainingArguments):
    """The flags of `AdversarialTrainingArguments`, with defaults for images."""

    output_dir: str = field(default="runs/images", metadata={"help": "Where models, table, picture and figures go."})
    num_train_epochs: float = field(default=30.0, metadata={"help": "Epochs."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images a training step."})
    per_device_eval_batch_size: int = field(default=250, metadata={"help": "Images a batch in the evaluation."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    logging_steps: float = field(default=0.25, metadata={"help": "A line of the log every so many steps, or fraction."})
    save_strategy: str = field(default="no", metadata={"help": "When to save checkpoints."})
    report_to: str = field(default="none", metadata={"help": "Where to send logs."})
    adv_method: str = field(default="pgd", metadata={"help": "The attack in training: pgd, fgsm or any other."})
    adv_epsilon: float = field(
        default=0.2, metadata={"help": "Size of the perturbation in training, after normalisation."}
    )
    adv_norm: str | None = field(default="linf", metadata={"help": "Norm of the perturbation in training."})
    adv_target: str = field(default="pixel_values", metadata={"help": "What is perturbed: leave it."})
    adv_clip: list[float] | None = field(
        default_factory=lambda: [0.0, 1.0], metadata={"help": "Valid range of a pixel before normalisation."}
    )
    adv_warmup: float = field(
        default=0.5, metadata={"help": "Optimizer steps, or, below 1, fraction of training, over which epsilon rises."}
    )


@dataclass(frozen=True)
class Images:
    """Images of one size, (images, side, side) of bytes, and their classes."""

    pixels: np.ndarray
    labels: np.ndarray

    def first(self, count: int) -> Images:
        """The first of them."""
        return Images(self.pixels[:count], self.labels[:count])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The whole script. Returns what it writes into `image_results.json`."""
    images_args, args = parse_arguments(argv)
    train, test = load_images(images_args)
    processor = make_processor(images_args)
    train_set, test_set = encode(processor, train), encode(processor, test)
    trainers: dict[str, AdversarialTrainer] = {}
    reports: dict[str, RobustnessReport] = {}
    for name in MODELS:
        print(f"\n{name}: training on {len(train_set)} images", flush=True)
        trainers[name] = train_model(images_args, with_attack(args, name), processor, train_set, test_set)
        print(f"{name}: under attack on {len(test_set)} images", flush=True)
        reports[name] = trainers[name].evaluate_robustness(
            attacks=attacks_to_try(images_args), epsilons=images_args.test_epsilons
        )
    plot_examples(images_args, args, trainers, test_set)
    return write_results(images_args, args, reports)


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[ImageArguments, Training]:
    """The flags of data and evaluation, and those of training."""
    parser = HfArgumentParser([ImageArguments, Training], description=__doc__)  # type: ignore[arg-type]
    images_args, args = parser.parse_args_into_dataclasses(argv)
    args.dataloader_pin_memory = torch.cuda.is_available()
    return images_args, args


# Data -----------------------------------------------------------------------------------------------------------------


def load_images(args: ImageArguments) -> tuple[Images, Images]:
    """Training and test images. Raises DataError where the files are not there."""
    train, test = load_digits_() if args.dataset == "digits" else load_idx(Path(args.dataset_folder))
    *_, train_count, test_count = DATASETS[args.dataset]
    return train.first(args.train_samples or train_count), test.first(args.test_samples or test_count)


def load_digits_() -> tuple[Images, Images]:
    """scikit-learn's 1797 digits, 0 to 16 made 0 to 255. The last 500, of writers of their own, are the test set."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = np.round(found.images * (255 / 16)).astype(np.uint8)
    return Images(pixels[:-500], found.target[:-500]), Images(pixels[-500:], found.target[-500:])


def load_idx(folder: Path) -> tuple[Images, Images]:
    """The four files of Fashion-MNIST, or of any data set in the form of MNIST."""
    missing = [name for names in IDX_FILES.values() for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"In {folder} there is no {', '.join(missing)}. On Debian and Ubuntu: `apt-get install "
            "dataset-fashion-mnist`, which puts the files into /usr/share/datasets/fashion-mnist. Elsewhere, pass the "
            "folder of the four files as --dataset_folder."
        )
    train, test = (Images(*(read_idx(folder / name) for name in IDX_FILES[part])) for part in ("train", "test"))
    for images in (train, test):
        if images.pixels.shape[1:] != (28, 28) or images.labels.shape != images.pixels.shape[:1]:
            raise DataError(
                f"{folder} holds images {images.pixels.shape} and labels {images.labels.shape}; expected are images of "
                "28 times 28 and a label for each."
            )
    return train, test


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of bytes: two zeros, the type (8), the number of sizes, the sizes, the values."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(f"{path} can't be read: {error}.") from error
    dims = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    shape = tuple(np.frombuffer(content, ">u4", dims, 4).tolist()) if len(content) >= 4 + 4 * dims else ()
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dims) if shape else np.empty(0, np.uint8)
    if not shape or values.size != math.prod(shape):
        raise DataError(f"{path} is no whole IDX file of bytes.")
    return values.reshape(shape)


def make_processor(args: ImageArguments) -> Any:
    """What makes the model's input of an image, and tells the Trainer the range that `adv_clip` means there."""
    side = DATASETS[args.dataset][1]
    return ViTImageProcessor(
        do_resize=False,
        size={"height": side, "width": side},
        do_rescale=True,
        do_normalize=True,
        image_mean=[args.image_mean],
        image_std=[args.image_std],
    )


def encode(processor: Any, images: Images) -> list[dict[str, Any]]:
    """One dictionary an image, as the model takes it."""
    found = processor([*images.pixels[..., None]], input_data_format="channels_last", return_tensors="pt")
    return [{"pixel_values": p, "labels": int(y)} for p, y in zip(found["pixel_values"], images.labels, strict=True)]


# Models ---------------------------------------------------------------------------------------------------------------


def with_attack(args: Training, name: str) -> Training:
    """The same flags for one of the two models. Epsilon 0 is the stock Trainer, so nothing else differs."""
    own = copy.deepcopy(args)
    own.output_dir = str(Path(args.output_dir) / name)
    own.adv_epsilon = 0.0 if name == "plain" else args.adv_epsilon
    return own


def train_model(
    images_args: ImageArguments, args: Training, processor: Any, train_set: Any, test_set: Any
) -> AdversarialTrainer:
    """Trains one model from scratch, and saves it."""
    set_seed(args.seed)
    trainer = AdversarialTrainer(
        model=new_model(images_args),
        args=args,
        train_dataset=train_set,
        eval_dataset=test_set,
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()
    return trainer


def new_model(args: ImageArguments) -> nn.Module:
    """A small model for images of one channel, its weights drawn at random."""
    names, side, patch, *_ = DATASETS[args.dataset]
    classes = {
        "num_channels": 1,
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }
    if args.architecture == "resnet":
        # The stem and every stage but the first halve the sides.
        sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic"}
        return ResNetForImageClassification(ResNetConfig(**sizes, **classes))
    sizes = {"hidden_size": args.hidden_size, "num_hidden_layers": args.layers, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 2 * args.hidden_size}
    return ViTForImageClassification(ViTConfig(image_size=side, patch_size=patch, **sizes, **classes))


# What comes out -------------------------------------------------------------------------------------------------------


def attacks_to_try(args: ImageArguments) -> list[Attack]:
    """The control, and attacks stronger than the one in training; no entry moves further than epsilon."""
    return [Noise(norm="linf"), FGSM(), PGD(norm="linf", steps=args.test_steps, random_start=True)]


def plot_examples(
    images_args: ImageArguments, args: Training, trainers: dict[str, AdversarialTrainer], test_set: Any
) -> None:
    """The first test images: clean, and for each model what PGD changes, what comes out, and what the model says."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    batch = default_data_collator(test_set[: images_args.shown])
    columns = {"clean": (batch["pixel_values"], None)}
    attack = PGD(epsilon=args.adv_epsilon, norm="linf", steps=images_args.test_steps, random_start=True)
    for name, trainer in trainers.items():
        clip = args.adv_clip and valid_range(args.adv_clip, trainer.processing_class)
        found = attack_batch(trainer.model, batch, attack, target="pixel_values", clip=clip)
        columns[f"{name}: change"] = (found.delta, None)
        columns[f"{name}: image"] = (found.inputs["pixel_values"], found.outputs.logits.argmax(-1).tolist())

    std, count = images_args.image_std, len(batch["labels"])
    limit = args.adv_epsilon * std
    figure = Figure(figsize=(1.2 * len(columns), 1.2 * count + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(count, len(columns), squeeze=False)
    for column, (title, (values, said)) in enumerate(columns.items()):
        axes[0, column].set_title(title, fontsize=7)
        for row, axis in enumerate(axes[:, column]):
            pixels = std * values[row, 0].float().cpu().numpy()
            axis.set(xticks=[], yticks=[])
            if "change" in title:
                axis.imshow(pixels, cmap="coolwarm", vmin=-limit, vmax=limit)
                continue
            axis.imshow(pixels + images_args.image_mean, cmap="gray", vmin=0, vmax=1)
            if said is not None:
                colour = "green" if said[row] == batch["labels"][row] else "red"
                axis.set_xlabel(DATASETS[images_args.dataset][0][said[row]], color=colour, fontsize=7, labelpad=1)
    figure.suptitle(f"{images_args.dataset}: PGD moves no pixel by more than {limit:g}; green: right", fontsize=8)
    figure.savefig(Path(args.output_dir) / "examples.png", dpi=120)


def write_results(images_args: ImageArguments, args: Training, reports: dict[str, RobustnessReport]) -> dict[str, Any]:
    """Prints the table, and writes settings, versions and every figure beside the picture."""
    print_robustness(reports)
    print(
        "Epsilon is the largest change of a value of the model's input, after normalisation: in pixels from 0 to 1, "
        f"epsilon times {images_args.image_std:g}.\nAdversarial: {args.adv_method}, norm {args.adv_norm}, epsilon "
        f"{args.adv_epsilon:g}. All figures, the picture and both models are in {args.output_dir}."
    )
    shown = ("seed", "num_train_epochs", "per_device_train_batch_size", "learning_rate")
    attack = {name: value for name, value in vars(args).items() if name in shown or name.startswith("adv_")}
    found = {
        "settings": asdict(images_args) | attack,
        "versions": versions(),
        "models": {name: report.to_dict() for name, report in reports.items()},
    }
    (Path(args.output_dir) / "image_results.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"run_image_classification: {error}")
