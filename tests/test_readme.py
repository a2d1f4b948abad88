"""What the documentation promises: links, tables, numbers, commands, Python blocks, and the front matter of a Space."""

import ast
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import urllib.request
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import CONFIG, DEMO, ROOT, perturb, serving
from gradio.media import get_image

import train_cifar
import train_imagenet
from analysis import read_metrics, uniform_non_locality
from convit_min import ConViT, create_model
from experiments import grid, report
from experiments.sweep import read_runs
from training.config import CHANGEABLE_ON_RESUME, parse_flags
from training.image_folder import _defer_signals

README = (ROOT / "README.md").read_text()
DOCS = {f"docs/{file.name}": file.read_text() for file in sorted((ROOT / "docs").glob("*.md"))}
TEXTS = {"README.md": README, "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text()} | DOCS
FILES = [
    *TEXTS,
    "docs/tour.ipynb",
    *(str(file.relative_to(ROOT)) for folder in ("demo", "results") for file in sorted((ROOT / folder).rglob("*.md"))),
]
BLOCKS = {  # by their file and first line
    f"{name}: {block.splitlines()[0]}": block
    for name, text in TEXTS.items()
    for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
}


def code_lines(text: str) -> list[str]:
    """The lines of indented code blocks, with continuation lines joined."""
    return re.findall(r"^    (\S.*)$", re.sub(r"\\\n\s+", "", text), re.MULTILINE)


def find_commands() -> list[str]:
    """All commands of our scripts in the documentation and in docstrings, which --help prints.

    Without what precedes "train_imagenet.py" and the like.
    """
    folders = "", "viewer/", "experiments/", "benchmarks/"
    scripts = [file for folder in folders for file in ROOT.glob(f"{folder}*.py")]
    docstrings = [ast.get_docstring(ast.parse(file.read_text())) or "" for file in scripts]
    commands = set()
    for text in [*TEXTS.values(), *docstrings]:
        for line in [*code_lines(text), *re.findall(r"`(python [^`]+)`", text)]:
            if match := re.search(r"(?:-- |python )((?:-m \w+\.|\w+\.py).*)", line):
                command = re.split(r"\s{2,}", match[1].rstrip("'"))[0]  # a description may follow
                if "$" not in command and "..." not in command:
                    commands.add(" ".join(shlex.split(command, comments=True)))
    return sorted(commands)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a text."""
    headings = re.findall(r"^#+ (.+)", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", FILES)
def test_links_resolve(name):
    file = ROOT / name
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", file.read_text()):
        path, _, anchor = link.partition("#")
        target = file.parent / path if path else file
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_readme_is_at_most_170_lines_and_lists_all_folders():
    assert len(README.splitlines()) <= 170
    assert len(re.findall(r"^    (.*pytest)$", README, re.MULTILINE)) == 1  # the one that .ci/run extracts
    entries = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in code_lines(README.split("## Folders")[1]))
    assert all((ROOT / name).exists() and len(words.split()) <= 6 for name, words in entries.items())
    packages = {f"{file.parent.name}/" for file in ROOT.glob("*/__init__.py")}
    assert packages | {file.name for file in ROOT.glob("*.py")} <= entries.keys()


@pytest.mark.parametrize("name", ["reproduce/gates", "reproduce/masking", "evidence/README"])
def test_tables_equal_the_results(name):
    """Of the grid, all tables before the learning rates: after a new report, copy them."""
    text = (ROOT / f"results/{name}.md").read_text().split("\n## ")[0]
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert tables and all(table.count("\n") > 2 and table in DOCS["docs/results.md"] for table in tables)


def test_numbers_in_the_readme_equal_the_results():
    def row(start: str) -> list[str]:
        return re.findall(r"\d+\.\d+", next(line for line in README.splitlines() if line.startswith(f"| {start}")))

    def ratios(benchmark: str, variant: str, mode: str) -> str:
        """Speed of convit_tiny, small, and base relative to the plain ViT, those of them that were measured."""
        rows = json.loads((ROOT / f"results/benchmarks/model-{benchmark}.json").read_text())["rows"]
        rows = [row for row in rows if row["variant"] == variant and "cifar" not in row["model"]]
        return ", ".join(f"{row[mode]['ratio']:.2f}" for row in rows)

    cifar = (ROOT / "results/cifar10/README.md").read_text()
    evidence = (ROOT / "results/evidence/README.md").read_text()
    for start, fraction in (("with 10%", "10%"), ("with all", "100%")):
        pattern = rf"^\| (?:ConViT|plain ViT) \| {fraction} \| ([\d.]+) ± ([\d.]+)"
        assert row(start) == [number for pair in re.findall(pattern, evidence, re.MULTILINE) for number in pair]
    assert row("CIFAR-10") == re.findall(r"^\| (?:cifar10|vit) \| ([\d.]+)", cifar, re.MULTILINE)
    text = " ".join(README.split())
    for start, mode in (("relative inference", "infer"), ("relative training", "train")):
        speeds = [ratios("cuda-bf16", variant, mode) for variant in ("ours", "timm ConViT")]
        line = next(line for line in README.splitlines() if line.startswith(f"| {start}"))
        assert "| **{}** (timm's ConViT: {}) |".format(*speeds) in line
    tiny = [ratios("cpu-fp32", "ours", mode).split(", ")[0] for mode in ("infer", "train")]
    assert "fp32, `convit_tiny` has {} at inference and {} in training".format(*tiny) in text
    bf16, fp32 = (
        json.loads((ROOT / f"results/benchmarks/model-cpu-{dtype}.json").read_text())["rows"]
        for dtype in ("bf16", "fp32")
    )
    nano = [
        next(row["train"]["images_per_second"] for row in rows if row["model"] == "convit_cifar_nano")
        for rows in (bf16, fp32)
    ]
    assert "{:.0f} and {:.0f} images/s on two cores".format(*nano) in text


def variant_rows(result: dict, variant: str) -> list[dict]:
    """The rows of a variant in a benchmark of the model, without the scaling rows."""
    return [row for row in result["rows"] if row["variant"] == variant]


def test_sentences_about_the_benchmarks_equal_the_results():
    text = " ".join(DOCS["docs/benchmarks.md"].split())
    pattern = r"^\| `(\w+)`, \d+ px, batch (\d+), (\w+) \| (.*) \|$"
    table = re.findall(pattern, DOCS["docs/benchmarks.md"], re.MULTILINE)
    gpu, *cpu = (
        json.loads((ROOT / f"results/benchmarks/model-{name}.json").read_text())
        for name in ("cuda-bf16", "cpu-fp32", "cpu-bf16")
    )
    expected = []
    for result, dtype in ((gpu, "bf16"), (cpu[0], "fp32"), (cpu[1], "bf16")):
        for ours, theirs in zip(*(variant_rows(result, variant) for variant in ("ours", "timm ConViT")), strict=True):
            ratios = [f"{row[key]['ratio']:.2f}" for row in (ours, theirs) for key in ("infer", "train", "memory")]
            expected.append((ours["model"], str(ours["batch"]), dtype, " | ".join(ratios)))
    assert table == expected
    single = [
        f"{row[mode]['ratio']:.2f}"
        for result in cpu
        for row in result["scaling"]
        if (row["variant"], row["size"], row["batch"]) == ("ours", 224, 1)
        for mode in ("infer", "train")
    ]
    assert "{} and {} (inference, training) in fp32, and {} and {} in bf16".format(*single) in text

    def speedups(results: list[dict], over: str, digits: int) -> list[str]:
        """Lowest and highest speed relative to a variant, at inference and in training."""
        ranges = []
        for mode in ("infer", "train"):
            pairs = [zip(variant_rows(result, "ours"), variant_rows(result, over), strict=True) for result in results]
            speeds = [[row[mode]["images_per_second"] for row in pair] for rows in pairs for pair in rows]
            factors = [f"{ours / other:.{digits}f}" for ours, other in speeds]
            ranges.append(f"{min(factors)} to {max(factors)}")
        return ranges

    explicit = "ours, explicit maps"
    on_cpu, on_gpu = speedups(cpu, explicit, 2), speedups([gpu], explicit, 2)
    assert "{} times as fast at inference and {} times in training, with".format(*on_cpu) in text
    saved = [
        ours["memory"]["mib"] / other["memory"]["mib"]
        for ours, other in zip(variant_rows(gpu, "ours"), variant_rows(gpu, explicit), strict=True)
    ]
    memory = f"with {min(saved):.2f} to {max(saved):.2f} of their memory"
    assert "on the GPU, {} and {} times as fast, {}".format(*on_gpu, memory) in text
    assert "inference is {} times as fast, and training {} times".format(*speedups([gpu], explicit, 1)) in text
    assert "met on the GPU ({} times at inference, {} in".format(*speedups([gpu], "timm ConViT", 1)) in text
    all_rows = variant_rows(gpu, "ours") + [row for row in gpu["scaling"] if row["variant"] == "ours"]
    ratios = [[f"{row[key]['ratio']:.2f}" for row in all_rows] for key in ("infer", "train", "memory")]
    low_high = [f"{min(values)} to {max(values)}" for values in ratios]
    ratio = next(row for row in all_rows if row["batch"] == 201)["infer"]["ratio"]
    assert f"and {ratio:.2f} with 201." in text
    assert f"with a batch of 201, `convit_tiny` infers at {ratio:.2f};" in " ".join(README.split())
    assert "missed on the GPU ({} at inference, {} in training".format(*low_high) in text
    needs = f"needs {low_high[2]} times the memory of the plain ViT of the same shape, on a GPU"
    assert f"missed, {low_high[2]} on the GPU" in text and needs in " ".join(DOCS["docs/distributed.md"].split())
    base, plain = (variant_rows(gpu, variant)[2] for variant in ("ours", "timm ViT, same shape"))
    peaks = [f"{row[mode]['of_peak']:.0%}" for row in (base, plain) for mode in ("train", "infer")]
    assert "trains at {} and infers at {} of the measured peak".format(*peaks[:2]) in text
    assert "the plain ViT of the same shape at {} and {}.".format(*peaks[2:]) in text
    scaling = {
        name: [row for row in gpu["scaling"] if row["variant"] == name] for name in ("ours", "timm ViT, same shape")
    }
    steps = []
    for rows in scaling.values():
        time = [1000 * row["batch"] / row["train"]["images_per_second"] for row in rows]
        of_peak = [100 * row["train"]["of_peak"] for row in rows]
        steps.append(f"{min(time):.0f} to {max(time):.0f} ms, at {min(of_peak):.0f} to {max(of_peak):.0f}%")
    assert "takes {} of the peak, and the plain ViT's {}.".format(*steps) in text
    assert [(row["batch"], row["size"]) for row in scaling["ours"]][::3] == [(201, 224), (24, 640)]
    last = {row["variant"]: row for row in gpu["scaling"] if row["size"] == 640}
    speedup = last["ours"]["train"]["images_per_second"] / last["timm ConViT"]["train"]["images_per_second"]
    per_image = [f"{last[name]['memory']['mib'] / 24:.0f}" for name in ("ours", "timm ConViT", "timm ViT, same shape")]
    assert f"trains {speedup:.1f} times as fast as timm's ConViT" in text
    assert "with {} instead of {} MiB per image; the plain ViT needs {} MiB".format(*per_image) in text
    memory = [row["memory"]["mib"] / 1024 for row in variant_rows(gpu, "ours")]
    sentence = (
        "takes {:.1f} GiB for 256 images with `convit_tiny`, {:.1f} GiB for 256 with `convit_small`, and {:.1f} GiB "
        "for 128 with `convit_base`"
    )
    assert sentence.format(*memory) in " ".join(DOCS["docs/distributed.md"].split())
    loading = json.loads((ROOT / "results/benchmarks/data_loading.json").read_text())["seconds"]
    for name, claim in (
        ("", "reads {:.0f} images/s with RandAugment"),
        (", without RandAugment", "and {:.0f} without it"),
    ):
        assert claim.format(1 / loading[f"ours, in the worker{name}"]) in text


def test_numbers_of_the_demos():
    rows, page = read_metrics(ROOT / "demo/patterns"), " ".join((ROOT / "demo/patterns/README.md").read_text().split())
    sentence = "{:.1f}% before training, {:.1f}% after epoch 8, {:.1f}% after epoch 10, {:.1f}% at the end"
    assert sentence.format(*(rows[epoch]["test_accuracy"] for epoch in (0, 8, 10, -1))) in page
    low = np.array([row["heads"]["gate"][:5] for row in rows], dtype=float) < 0.5
    assert f"in epoch {low.any((1, 2)).argmax()}; {low[-1].sum()} of 45 end below it" in page
    files = ("demo/patterns", "demo/cifar10", "results/reproduce")
    patterns, cifar, committed = (
        json.loads((ROOT / name / "masking.json").read_text())["masked_in_first_layers"] for name in files
    )
    ends = [runs["content"][index] for runs in (patterns, cifar) for index in (0, -1)]
    drops = "on the patterns drops from {:.1f} to {:.1f}%, and on CIFAR-10 from {:.1f} to {:.1f}%".format(*ends)
    assert cifar == committed and drops in " ".join(DOCS["docs/viewer.md"].split())
    heads, text = read_metrics(DEMO)[-1]["heads"], " ".join(DOCS["docs/results.md"].split())
    gate, strength = (np.array(heads[key][:5]) for key in ("gate", "strength"))
    assert f"{(gate < 0.5).sum()} of the 45 heads end with a gate below 0.5" in text
    assert f"{(gate > 0.7311).sum()} heads end above their initial gate" in text
    assert f"from 1 at initialization to {strength.max():.2f} or lower" in text
    assert f"its mean attention distance is {heads['non_locality'][1][4]:.2f} patches" in text


def test_claims_at_this_scale_equal_the_runs():
    """The numbers in the last table of docs/results.md that no other result has."""
    runs, text = read_runs(ROOT / "results/evidence/runs.jsonl"), DOCS["docs/results.md"]
    demo, tiny = map(read_metrics, (DEMO, ROOT / "results/tiny-imagenet-50"))
    plain = next(iter(read_runs(ROOT / "results/cifar10/runs.jsonl").values()))["metrics"]

    def pairs_on(fraction: str) -> list[list[list[dict]]]:
        """The metrics of both models, for every seed."""
        return [
            [runs[f"{model}-{fraction}-seed{seed}"]["metrics"] for model in ("convit", "vit")] for seed in grid.SEEDS
        ]

    def leads(pairs) -> np.ndarray:
        accuracy = np.array([[[row["test_accuracy"] for row in run] for run in pair] for pair in pairs])
        return (accuracy[:, 0] - accuracy[:, 1]).mean(0)

    by_epoch = leads([[demo, plain]])
    for start, fraction in (("on 10%, it grows: ", "10%"), ("and on all images: ", "100%")):
        quarters = ", ".join(f"{lead:+.1f}" for lead in leads(pairs_on(fraction))[1:])
        after = " after each quarter" if fraction == "10%" else ""
        assert f"{start}{quarters}{after} (5 pairs)" in text
    full = leads(pairs_on("100%"))[-1]
    assert f"on all images, {full:+.1f} after 10,000 steps (5 pairs)" in text
    half = report.half_interval([leads([pair])[-1] for pair in pairs_on("100%")])
    assert f"On all images, the lead is {full:+.1f} points ({full - half:+.1f} to {full + half:+.1f}, not among" in text
    assert f"in epoch {by_epoch.argmax()} of 30: {by_epoch.max():+.1f}, and {by_epoch[-1]:+.1f} at the end" in text
    assert f"{by_epoch[-1]:+.1f} after 30 epochs (one pair)" in text

    def heads(name: str, runs: list[list[dict]]) -> np.ndarray:
        """A statistic of the GPSA layers after the last epoch: run, layer, head."""
        return np.array([run[-1]["heads"][name][:5] for run in runs], dtype=float)

    on_10, on_100 = ([pair[0] for pair in pairs_on(fraction)] for fraction in ("10%", "100%"))
    replication = read_runs(ROOT / "results/evidence-cpu/runs.jsonl")
    cpu = [run["metrics"] for name, run in replication.items() if name.startswith("convit-")]
    low = (heads("gate", [demo, tiny, *on_10, *on_100, *cpu]) < 0.5).sum((1, 2))
    assert f"{low.min()} to {low.max()} of 45 gates end below 0.5 in all twenty" in text and len(low) == 20
    slow = heads("gate", [runs[f"patterns-gate-lr-1-seed{seed}"]["metrics"] for seed in grid.PATTERN_SEEDS])
    assert f"lowest gate: {slow.min():.2f}" in text and slow.min() > 0.66
    centers = [(heads("gate", runs)[:, :, 4] < 0.5).sum(0).tolist() for runs in (on_10 + on_100, cpu)]
    assert centers == [[0, 10, 10, 10, 10], [1, 8, 8, 8, 8]]  # the sentence about these runs in "Center taps"

    distance = [heads("non_locality", runs).mean(2) for runs in (on_10, on_100, [demo], [tiny])]
    is_last = [f"{(layers.argmax(1) == 4).sum()} of {len(layers)}" for layers in distance[:2]]
    assert "layer 5 has the largest non-locality in {} seeds on 10% and {} on all images".format(*is_last) in text
    assert distance[2].argmax() == 0 and distance[3].max() - distance[3][0, 3:].min() < 0.01
    lowest = [heads("gate", runs).mean(2).argmin(1).tolist() for runs in (on_10, on_100, [demo], [tiny])]
    late = [sum(layer >= 3 for layer in layers) for layers in lowest[:2]]
    assert f"| seen in {sum(late)} of 12 |" in text and lowest[2:] == [[0], [1]]
    assert "lowest mean gate in {} of 5 seeds on 10% and {} of 5 on all images".format(*late) in text
    assert {layer for layers in lowest[:2] for layer in layers if layer < 3} == {0}

    for name, start in (("gates-0.73", "the plain ViT by"), ("gates-0.5", "gates frozen at 0.5 by")):
        gains = [
            runs[f"{name}-10%-seed{seed}"]["metrics"][-1]["test_accuracy"] - vit[-1]["test_accuracy"]
            for seed, (_, vit) in zip(grid.SEEDS, pairs_on("10%"), strict=True)
        ]
        mean, half = np.mean(gains), report.half_interval(gains)
        ends = f"({mean - half:+.1f} to {mean + half:+.1f}"
        assert re.search(rf"{start} {mean:.1f}( points)? {re.escape(ends)}", " ".join(text.split()))
    drops = [
        np.mean([run[3]["test_accuracy"] - run[4]["test_accuracy"] for run in model])
        for model in zip(*pairs_on("10%"), strict=True)
    ]
    assert "(ConViT by {:.1f}, the plain ViT by {:.1f} points, which".format(*drops) in " ".join(text.split())


def test_what_the_heads_of_the_demo_do():
    """The list below the table of gates in docs/results.md."""
    metrics, text = read_metrics(DEMO), " ".join(DOCS["docs/results.md"].split())
    gate, strength, distance = (
        np.array([record["heads"][name] for record in metrics], dtype=float)
        for name in ("gate", "strength", "non_locality")
    )
    first_below = [np.argmax(gate[:, layer] < 0.5, axis=0) + 99 * (gate[:, layer] >= 0.5).all(0) for layer in range(5)]
    assert [epochs.argmin() for epochs in first_below] == [4] * 5  # head 5
    epochs = [epochs.min() for epochs in first_below]
    assert f"after {min(epochs)} to {max(epochs)} epochs" in text
    center = gate[-1, :, 4]
    assert "({:.2f}, {:.2f}, {:.2f}, and {:.2f})".format(*center[[0, 2, 3, 4]]) in text
    assert f"rises again to {center[1]:.2f}, but" in text and f"slightly negative ({strength[-1, 1, 4]:.2f})" in text
    assert f"above the {uniform_non_locality((8, 8)):.2f} of uniform attention" in text
    assert (gate[-1, :5] < 0.5).sum(1).tolist() == [5, 0, 2, 1, 1]  # "five in layer 1, two in layer 3, one each ..."
    layers = distance.mean(2)
    grows = "grows from {:.1f} to {:.1f} in layer 1 and to {:.1f} in layer 5"
    assert grows.format(layers[0, 0], layers[-1, 0], layers[-1, 4]) in text
    assert f"stay between {layers[1:, 1:4].min():.2f} and {layers[1:, 1:4].max():.2f} after the first epoch" in text
    assert "The SA layers end at {:.1f} and {:.1f}".format(*layers[-1, 5:]) in text


def test_single_runs_and_tuning():
    """The other numbers in docs/results.md."""
    text = " ".join(DOCS["docs/results.md"].split())

    def lead(accuracies: list[float]) -> str:
        second, best = sorted(accuracies)[-2:]
        return f"{best - second:.1f}"

    def validation(runs: dict, start: str) -> list[float]:
        return [run["metrics"][-1]["test_accuracy"] for name, run in runs.items() if name.startswith(start)]

    tuning, grid_runs = (read_runs(ROOT / f"results/{name}/runs.jsonl") for name in ("tuning", "evidence"))
    settings = [lead(validation(tuning, start)) for start in ("convit-", "vit-")]
    assert "second best by {} (ConViT) and {} points (plain ViT); the".format(*settings) in text
    rates = [
        lead(validation(grid_runs, f"tune-{name}-{part}-")) for part in ("10%", "100%") for name in ("convit", "vit")
    ]
    assert (
        "by {} (ConViT) and {} points (plain ViT) on 10%, and by {} and {} points on all images".format(*rates) in text
    )
    masking = json.loads((ROOT / "results/reproduce/masking.json").read_text())
    ends = [curve[-1] for curve in masking["masked_in_first_layers"].values()]
    assert "it still has {:.1f}%, without position {:.1f}%".format(*ends) in text
    assert f"our model has {masking['position_embedding_masked']:.1f}%" in text
    tiny = read_metrics(ROOT / "results/tiny-imagenet-50")[-1]
    assert f"reaches {tiny['test_accuracy']:.1f}% top-1 accuracy in {tiny['epoch']} epochs" in text


def test_planned_contrasts_decide_the_claims():
    """In the table of claims, in the list of the patterns, and wherever else they are cited."""
    text, evidence = DOCS["docs/results.md"], (ROOT / "results/evidence/README.md").read_text()
    assert report.GRID_NOTES in evidence
    contrasts = [line.strip("| ").split(" | ") for line in text.splitlines() if "| 5 of 5 |" in line]
    claims = "On scarce data,", "The lead grows", "Without gating, accuracy drops on 10%"
    for (_, _, points, *_, verdict), start in zip(contrasts, claims, strict=False):  # the fourth qualifies the third
        claim = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
        direction = "confirmed" if points.startswith("+") else "contradicted"
        results = {"different": direction, "equivalent": "no difference", "undecided": "undecided"}
        assert claim.split(" | ")[1] == results[re.match(r"\w+", verdict)[0]]
    assert ("helps beyond their initial value" in text) == contrasts[3][-1].startswith("different")

    (lead, ends, p), (growth, growth_ends, growth_p), (half, half_ends, half_p), (fixed, fixed_ends, fixed_p) = (
        (*re.match(r"(\S+) \((.*)\)", points).groups(), float(p_holm)) for _, _, points, _, p_holm, *_ in contrasts
    )
    half, fixed = half[1:], fixed[1:]
    unsigned = [ends.replace("+", "") for ends in (half_ends, fixed_ends)]
    all_images = re.search(r"On all images, the lead is \+(\d\.\d) points \((.*?), not", text)
    assert float(p) < 0.001
    cited = {
        "README.md": [
            f"is {lead[1:]} points ({ends}; paired t-test, adjusted p < 0.001)",
            f"{growth[1:]} points smaller ({growth_ends}; adjusted p = {growth_p:.2f}: undecided",
            f"frozen at 0.5 by {half} points ({half_ends}; adjusted p = {half_p:.3f})",
            f"their initial value, by {fixed} ({fixed_ends}; adjusted p = {fixed_p:.3f})",
        ],
        "docs/results.md": [
            f"by {lead[1:]} points ({ends}) on 10% of CIFAR-10, and by {all_images[1]} ({all_images[2]}, not planned)",
            f"undecided ({growth}, {growth_ends}); it does not grow by {11.6 - 1.5:.1f} points as in the paper",
            f"at 0.5 by {half} points ({half_ends}), and gates frozen at 0.73 by {fixed} ({fixed_ends})",
            f"on 10%: {lead} points (95%: {ends})",
            f"that on all images: {growth} points (95%: {growth_ends})",
            f"a growth of more than {growth_ends.split('+')[1]} points is outside the interval",
            f"cost {half} points (95%: {unsigned[0]}), the third planned contrast",
            f"cost {fixed} ({unsigned[1]}), the fourth",
        ],
        "docs/exercises.md": [
            f"cost {half} points in",
            f"(95% interval {unsigned[0]}; paired t-test, adjusted p = {half_p:.3f})",
            f"costs {fixed} points (95% interval {unsigned[1]}; paired t-test, adjusted p = {fixed_p:.3f})",
        ],
    }
    cpu = (ROOT / "results/evidence-cpu/README.md").read_text()
    (on_10, on_10_ends, p), (growth, growth_ends, growth_p) = re.findall(
        r"\| (\S+) \((.+?)\) \| \S+ \| (\S+) \| \S+ \| ", cpu
    )
    cited["docs/results.md"] += [
        f"On 10%, the lead is {on_10} points ({on_10_ends}, five pairs); the lead on 10% minus that on all images is "
        f"{growth} points ({growth_ends}, three pairs)",
        f"the second is undecided ({float(growth_p):.2f})",
    ]
    assert float(p) < 0.001
    for name, sentences in cited.items():
        for sentence in sentences:
            assert sentence in " ".join(TEXTS[name].split()), sentence

    patterns = re.search(r"^\| arm(?:.*\n)+", evidence, re.MULTILINE)[0]
    assert patterns in text
    reached = {
        cells[0]: [math.inf if steps == "never" else int(steps) for steps in cells[1].split(", ")]
        for cells in (line.strip("| ").split(" | ") for line in patterns.splitlines()[2:])
    }
    slow = [steps for arm in ("gates-1", "gates-1-lr0.0003") for steps in reached[arm] if steps < math.inf]
    assert (
        f"need {min(slow)} to {max(slow):,} steps" in " ".join(text.split())
        and reached["gates-1-lr0.003"] == [math.inf] * 3
    )
    fast = sorted(steps for arm in ("learned", "vit", "gates-0.5", "gates-0.73") for steps in reached[arm])
    assert f"all need {fast[0]} to {fast[-2]} steps, but for one seed with learned gates, which needs {fast[-1]:,}" in (
        " ".join(text.split())
    )
    assert fast[-1] == max(reached["learned"])
    assert [reached[arm].count(math.inf) for arm in ("gate-lr-1", "gates-1", "gates-1-lr0.0003")] == [1, 1, 0]
    with_content = [steps for arm in reached if not arm.startswith("gates-1") for steps in reached[arm]]
    assert (sum(steps <= fast[-2] for steps in with_content), len(with_content)) == (13, 15)


def test_measurements_in_sentences_equal_the_results():
    def results(name: str) -> dict:
        return json.loads((ROOT / f"results/benchmarks/{name}.json").read_text())

    vit = read_runs(ROOT / "results/cifar10/runs.jsonl")["vit"]["metrics"]
    minutes = [sum(50_000 / row["images_per_second"] for row in run[1:]) / 60 for run in (read_metrics(DEMO), vit)]
    rows = {row["variant"]: row for row in results("model-cpu-fp32")["scaling"] if row["size"] == 640}  # one image each
    steps = [
        value
        for name in ("ours", "timm ViT, same shape", "timm ConViT")
        for value in (1 / rows[name]["train"]["images_per_second"], rows[name]["memory"]["mib"])
    ]
    loading = results("data_loading")["seconds"]
    speedup = [
        loading[f"torchvision, in the worker{name}"] / loading[f"ours, in the worker{name}"]
        for name in ("", ", without RandAugment")
    ]
    samples = list(results("viewer")["milliseconds"].values())
    _, hover, snapshot, layer, upload, _, clients = map(statistics.median, samples)
    slow = statistics.quantiles(samples[-1], n=20)[-1] / 1000
    memory = results("viewer")["mebibytes"]["after"]
    sentences = {
        "README.md": [f"took {minutes[0]:.1f} minutes"],
        "docs/results.md": [f"| **84.1** | {minutes[0]:.1f} minutes |", f"| 78.2 | {minutes[1]:.1f} minutes |"],
        "docs/benchmarks.md": [
            "takes {:.2f} s and {:.0f} MiB per image, against {:.2f} s and {:.0f} MiB for the plain ViT and {:.2f} s "
            "and {:.0f} MiB for timm's ConViT".format(*steps),
            f"{speedup[0]:.2f} times as many as one with torchvision's",
            f"without it, {speedup[1]:.2f} times",
            f"in {hover:.1f} ms (median); changing the snapshot or the layer takes {snapshot:.0f} and {layer:.0f} ms",
            f"an upload of 12 megapixels {upload / 1000:.2f} s",
            f"response takes {clients:.0f} ms, the 95th percentile {slow:.2f} s",
        ],
        "docs/viewer.md": [
            f"({hover:.1f} ms, median)",
            f"in {clients:.0f} ms (median; 95th percentile: {slow:.1f} s)",
            f"used {memory:.0f} MiB",
        ],
    }
    for name, texts in sentences.items():
        for text in texts:
            assert text in " ".join(TEXTS[name].split()), text


def test_times_of_the_grid():
    def hours(runs: list[dict]) -> float:
        return sum(entry.get("wall_clock_s", 0) for run in runs for entry in run["provenance"]) / 3600

    grid_runs, cpu = (read_runs(ROOT / f"results/{name}/runs.jsonl") for name in ("evidence", "evidence-cpu"))
    on_cpu = [*cpu.values(), *(run for run in grid_runs.values() if "CPU" in run["provenance"][0]["device"])]
    per_step = hours(on_cpu) / sum(run["metrics"][-1]["step"] for run in on_cpu)
    total = 13 * 5_000 + 40 * 10_000 + 24 * 3_120  # steps
    documented = int(re.search(r"into runs/grid: about (\d+) hours", DOCS["docs/results.md"])[1])
    assert documented == pytest.approx(total * per_step, rel=0.1)
    on_gpu = [run["provenance"][0] for run in grid_runs.values() if "H100" in run["provenance"][0]["device"]]
    starts = [datetime.fromisoformat(entry["started"]) for entry in on_gpu]
    ends = [start + timedelta(seconds=entry["wall_clock_s"]) for start, entry in zip(starts, on_gpu, strict=True)]
    minutes = (max(ends) - min(starts)).total_seconds() / 60
    sentence = (
        f"Our {len(on_gpu)} runs on the GPU (30 of 10,000 steps and 24 of 3,120; without tuning) took {minutes:.0f}"
    )
    assert sentence in " ".join(DOCS["docs/results.md"].split())


@pytest.mark.parametrize("command", find_commands())
def test_commands_have_known_flags(command, monkeypatch):
    program, *args = command.removeprefix("-m ").split()
    if program == "http.server":
        return  # of Python itself
    for module in (train_cifar, train_imagenet):
        if program == f"{module.__name__}.py":
            args = re.sub(r"--resume|--eval|--config \S+", "", " ".join(args)).split()  # they would read a run folder
            monkeypatch.setattr(sys, "argv", [program, *args])
            assert parse_flags(module.Config, "").total_epochs > 0
            return
    file = ROOT / (program if program.endswith(".py") else program.replace(".", "/") + ".py")
    sources = [file.read_text()] + [(ROOT / "benchmarks/timing.py").read_text()] * program.startswith("benchmarks")
    flags = [arg for arg in args if arg.startswith("--")]
    assert all(any(f'"{flag}"' in source for source in sources) for flag in flags), flags


def test_flags_that_may_change_on_resume_are_listed():
    sentence = re.search(r"These flags may change on `--resume`:(.*?);", DOCS["docs/distributed.md"], re.DOTALL)[1]
    listed = {name.replace("-", "_") for name in re.findall(r"`--([\w-]+)`", sentence)}
    assert listed | {"run", "resume", "weights", "eval", "csv"} == CHANGEABLE_ON_RESUME  # these belong to one command


def test_workers_outlast_the_documented_shutdown(monkeypatch):
    """torchrun sends SIGTERM to all: workers that ended at once would end the step that is being saved."""
    script = re.search(r"    #!/bin/bash\n(?:    .*\n)+", DOCS["docs/distributed.md"])[0]
    assert {"--nodes", "--ntasks-per-node", "--gpus-per-node"} <= set(re.findall(r"(--[\w-]+)=", script))
    documented = re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", DOCS["docs/distributed.md"])
    handlers, alarms = {}, []
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(signal, "alarm", alarms.append)
    _defer_signals(0)
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert alarms == [int(documented[1])] and handlers[signal.SIGINT] == signal.SIG_IGN


def test_seed_loop_prints_mean_and_standard_deviation(tmp_path, monkeypatch, capsys):
    for seed, accuracy in enumerate((50.0, 52.0, 54.0)):
        (tmp_path / f"seed{seed}").mkdir()
        (tmp_path / f"seed{seed}" / "metrics.jsonl").write_text(f'{{}}\n{{"test_accuracy": {accuracy}}}\n')
    monkeypatch.setattr(sys, "argv", ["-c", *map(str, tmp_path.iterdir())])
    exec(re.search(r"python -c '(.*?)' runs", DOCS["docs/distributed.md"].replace("\n    ", "\n"), re.DOTALL)[1], {})
    assert capsys.readouterr().out == "52.0 ± 2.0 (3)\n"


OPTIONAL = {"playwright", "scipy", "tensorboard", "timm", "safetensors"}  # only in requirements-dev.txt
PACKAGES = {"PIL": "pillow", "gradio_client": "gradio", "huggingface_hub": "gradio", "packaging": "gradio"}


def imports(file: Path) -> set[str]:
    """The modules and packages that a file imports."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[0] for name in plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}}


def test_requirements_list_what_is_imported():
    """The test tools aside, which need only be in requirements-dev.txt."""
    listed = {
        name: set(re.findall(r"^[\w-]+", (ROOT / f"requirements{name}.txt").read_text(), re.MULTILINE))
        for name in ("", "-dev")
    }
    ours = {path.stem for path in ROOT.iterdir()}
    for file in (file for pattern in ("*.py", "[a-z]*/*.py") for file in ROOT.glob(pattern)):
        others = imports(file) - sys.stdlib_module_names - ours - {"conftest"}
        packages = {PACKAGES.get(name, name) for name in others}
        required = listed[""] | (listed["-dev"] if file.parent.name == "tests" else OPTIONAL & listed["-dev"])
        assert packages <= required, file


@pytest.fixture
def workspace(tmp_path, monkeypatch, request):
    """A folder with an image and a run, where weights that would be downloaded are made up."""
    (tmp_path / "runs" / "cifar").mkdir(parents=True)
    shutil.copy(max((DEMO / "snapshots").iterdir()), tmp_path / "runs" / "cifar" / "best.pt")
    shutil.copy(get_image("cheetah1.jpg"), tmp_path / "cat.jpg")
    (tmp_path / "demo").symlink_to(DEMO.parent)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))

    def download(url: str, file: str):
        if url == "https://dl.fbaipublicfiles.com/convit/convit_tiny.pth":
            return torch.save(request.getfixturevalue("released").state_dict(), file)
        assert url == "https://dl.fbaipublicfiles.com/deit/deit_tiny_patch16_224-a1311bcf.pth"
        deit = perturb(create_model("deit_tiny")).state_dict()
        deit["pos_embed"] = torch.cat([deit["cls_token"], deit["pos_embed"]], dim=1)
        torch.save({"model": deit}, file)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)


@pytest.fixture
def released() -> torch.nn.Module:
    return perturb(create_model("convit_tiny"))


@pytest.fixture
def timm_model(monkeypatch, released) -> torch.nn.Module:
    """What timm.create_model returns: `released`, which needs no download."""
    model = timm.create_model("convit_tiny")
    model.load_state_dict(released.state_dict())
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: model)
    return model.eval()


def run_block(title: str) -> dict:
    """Execute the Python block with these words in its first line; return its variables."""
    (block,) = (block for name, block in BLOCKS.items() if title in name)
    variables = {}
    exec(block, variables)
    return variables


def same_logits(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    images = torch.randn(1, 3, *model.config.image_shape)
    with torch.no_grad():
        return torch.allclose(model(images), other.eval()(images), atol=1e-4)


def test_imports_point_one_way():
    """As CONTRIBUTING.md says."""
    ours, allowed = {path.stem for path in ROOT.iterdir()}, set()
    for level in (["convit_min", "images"], ["weights", "analysis"], ["training"], ["viewer"]):
        for name in level:
            for file in [*ROOT.glob(f"{name}.py"), *ROOT.glob(f"{name}/*.py")]:
                assert imports(file) & ours <= allowed | {name}, file
        allowed |= set(level)
    assert imports(ROOT / "convit_min.py") - sys.stdlib_module_names == {"torch", "einops"}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", [name for name in BLOCKS if not re.search("client|timm|export:", name)])
def test_python_runs_as_written(name, workspace):
    exec(BLOCKS[name], {})


def test_readme_gets_attention_maps_in_five_lines():
    name = "README.md: import torch"
    assert len(list(filter(None, BLOCKS[name].splitlines()))) == 5
    attention = run_block(name)["attention"]
    assert attention[0].mixed.shape == (1, 4, 196, 196) and attention[0].gate.shape == (4,)


def test_weights_of_the_authors(released, workspace):
    assert same_logits(run_block("the authors' weights")["model"], released)


def test_weights_of_a_run(workspace):
    variables = run_block("your own run")
    record = torch.load("runs/cifar/best.pt", weights_only=True)
    state = variables["model"].state_dict()
    assert all(torch.equal(value.half(), record["model"][name]) for name, value in state.items())
    assert (variables["model"].classes, variables["model"].epoch) == (record["classes"], record["epoch"])


def test_weights_of_timm_and_back(released, timm_model):
    variables = run_block("timm's weights")
    model = variables["model"]
    assert model is not released and same_logits(released, model)
    perturb(model)
    assert not same_logits(model, timm_model)
    exec("timm_model.load_state_dict(model.state_dict())", variables)  # the last line of the block
    assert same_logits(model, timm_model)


def test_deit_goes_back_to_timm():
    ours, theirs = perturb(create_model("deit_tiny")), timm.create_model("deit_tiny_patch16_224")
    state = ours.state_dict()
    exec(re.search(r'`(state\["pos_embed"\] = .+?)`', DOCS["docs/finetuning.md"])[1], {"state": state, "F": F})
    theirs.load_state_dict(state)
    assert same_logits(ours, theirs)


def test_features_of_several_blocks():
    variables = run_block("features of several blocks")
    variables["backbone"](torch.randn(1, 3, 224, 224))
    shapes = {index: features.shape for index, features in variables["features"].items()}
    assert shapes == dict.fromkeys((3, 6, 9), (1, 196, 192))


def test_pip_installs_the_model_alone():
    text = (ROOT / "pyproject.toml").read_text()
    modules, needed = (
        ast.literal_eval(re.search(rf"^{name} = (\[.*\])$", text, re.MULTILINE)[1])
        for name in ("py-modules", "dependencies")
    )
    assert modules == ["convit_min"] and {re.match(r"\w+", line)[0] for line in needed} == {"torch", "einops"}
    assert set(needed) <= set((ROOT / "requirements.txt").read_text().splitlines())


def test_features_for_any_image_size(workspace):
    variables = run_block("features of the patches")
    assert variables["feature_map"].shape == (2, 192, 16, 12) and variables["cls_token"].shape == (2, 192)


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_exported_model_takes_any_batch_and_size(tmp_path, monkeypatch):
    """With a small model instead of the demo, one block of either kind."""
    import onnxruntime  # slow

    model = perturb(ConViT(replace(CONFIG, depth=2, gpsa_layers=1)))
    monkeypatch.setattr("weights.open_model", lambda _: model)
    monkeypatch.chdir(tmp_path)
    program = run_block("export: batch")["program"].module()
    session = onnxruntime.InferenceSession("model.onnx")
    for shape in ((2, 3, 32, 32), (5, 3, 20, 28), (1, 3, 12, 36)):
        images = torch.randn(shape)
        with torch.no_grad():
            expected = model(images)
            torch.testing.assert_close(program(images), expected, atol=1e-5, rtol=0)
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-5, rtol=0)
    fixed = torch.export.export(model, (torch.randn(2, 3, 20, 28),))
    assert "upsample" in str(program) and "upsample" not in str(fixed)  # resizes pos_embed only where sizes may differ


def test_attention_rollout(workspace):
    variables = run_block("attention rollout")
    torch.testing.assert_close(variables["rollout"].sum(-1), torch.ones(1, 65))
    row = torch.eye(65)[0]  # backward, from the class token to the input
    for maps in reversed(variables["attention"]):
        mixed = maps.mixed[0].mean(0)
        attended = torch.cat([row[:1], row[1:] @ mixed]) if len(mixed) == 64 else row @ mixed
        row = (row + attended) / 2
    torch.testing.assert_close(variables["rollout"][0, 0], row)
    torch.testing.assert_close(variables["heat_map"], row[1:].unflatten(0, (8, 8)))


def test_notebook_prints_what_it_shows(tmp_path):
    """With a training of two steps; what follows from the training, or from the decoder of photos, is not compared."""

    def stable(text: str) -> str:
        return re.sub(r", distance [\d.]+", "", text)  # of attention maps of a photo

    cells = json.loads((ROOT / "docs/tour.ipynb").read_text())["cells"]
    cells = [("".join(cell["source"]), cell["outputs"]) for cell in cells if cell["cell_type"] == "code"]
    code, count = re.subn(r'"epochs": \d+, "steps_per_epoch": \d+', '"epochs": 1, "steps_per_epoch": 2',
                          "\n".join(source for source, _ in cells))  # fmt: skip
    env = os.environ | {"MPLBACKEND": "Agg", "TMPDIR": str(tmp_path)}
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "docs", env=env, capture_output=True, text=True)
    assert process.returncode == 0 and count == 1, process.stderr
    shown = ["".join(outputs[0]["text"]) for source, outputs in cells if outputs and "text" in outputs[0]
             and not re.search(r"train\(|open_model\(run\)|predict\(", source)]  # fmt: skip
    assert len(shown) == 3 and all(stable(text) in stable(process.stdout) for text in shown)
    assert all(f"gates {gate}: accuracy" in process.stdout for gate in ("trained", 1, 0))


def test_hugging_face_space_and_python_client(workspace, tmp_path_factory, monkeypatch):
    """The front matter in docs/viewer.md is valid, matches requirements.txt, and the app starts as in a Space."""
    import gradio_client
    import huggingface_hub as hub
    from packaging.requirements import Requirement

    lines = re.search(r"^    ---\n(.*?)^    ---\n", DOCS["docs/viewer.md"], re.DOTALL | re.MULTILINE)[0]
    card = hub.SpaceCard(lines.replace("\n    ", "\n").lstrip() + "\n" + README).data
    requirements = (ROOT / "requirements.txt").read_text().split()
    gradio = Requirement(next(line for line in requirements if line.startswith("gradio")))
    assert card.sdk == "gradio" and gradio.specifier.contains(card.sdk_version)
    assert (ROOT / card.app_file).exists() and card.license == "mit"
    client = gradio_client.Client
    with serving(tmp_path_factory.mktemp("server"), space=True) as url:
        if sys.platform == "linux":  # it listens on all addresses; macOS has only one
            assert b"ConViT" in urllib.request.urlopen(url.replace("127.0.0.1", "127.0.0.2")).read()
        monkeypatch.setattr(gradio_client, "Client", lambda _: client(url, verbose=False))
        heads = run_block("client of a running viewer")["heads"]
    assert len(heads) == 9 and 0 < heads[4]["gate"] < 1
    assert len(heads[4]["mixed"]) == 8 and sum(map(sum, heads[4]["mixed"])) == pytest.approx(1, abs=1e-5)
