"""The numbers in README and docs are those of the committed results."""

import json
import math
import re
import statistics
from collections.abc import Iterator
from datetime import datetime, timedelta
from functools import cache

import numpy as np
import pytest
from conftest import DEMO, ROOT

from analysis import read_metrics, uniform_non_locality
from experiments import grid, report
from experiments.sweep import read_runs

DOCS = {f"docs/{file.name}": file.read_text() for file in sorted((ROOT / "docs").glob("*.md"))}


@cache
def runs(name: str) -> dict[str, dict]:
    """The runs of a folder in results/, by name."""
    return read_runs(ROOT / f"results/{name}/runs.jsonl")


def benchmark(name: str) -> dict:
    return json.loads((ROOT / f"results/benchmarks/{name}.json").read_text())


def model_rows(name: str, part: str = "rows") -> dict[str, list[dict]]:
    """A benchmark of the model, by variant; the part "scaling" has convit_tiny at several image sizes."""
    variants = {}
    for row in benchmark(f"model-{name}")[part]:
        variants.setdefault(row["variant"], []).append(row)
    return variants


def unwrapped(page: str) -> str:
    """The text of a page without line breaks."""
    return " ".join((ROOT / page).read_text().split())


def says(page: str, *sentences: str):
    """Assert that a page has these sentences, wherever its lines break."""
    text = unwrapped(page)
    for sentence in sentences:
        assert sentence in text, f"{page} does not say: {sentence}"


def span(values, spec: str = ".2f") -> str:
    """The lowest and the highest value, as in "0.59 to 0.79"."""
    return f"{min(values):{spec}} to {max(values):{spec}}"


BENCHMARKS = "cuda-bf16", "cpu-fp32", "cpu-bf16"
EXPLICIT, TIMM, PLAIN = "ours, explicit maps", "timm ConViT", "timm ViT, same shape"


@pytest.mark.parametrize("name", ["reproduce/gates", "reproduce/masking", "evidence/README"])
def test_tables_equal_the_results(name):
    """All tables but that of the learning rates: after a new report, copy them."""
    text = (ROOT / f"results/{name}.md").read_text()
    tables = [table for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE) if "| chosen |" not in table]
    assert tables and all(table.count("\n") > 2 and table in DOCS["docs/results.md"] for table in tables)


def test_numbers_in_the_readme_equal_the_results():
    evidence, gpu, fp32, bf16 = (ROOT / "results/evidence/README.md").read_text(), *map(model_rows, BENCHMARKS)

    def five_seeds(fraction: str) -> str:
        pattern = rf"^\| (?:ConViT|plain ViT) \| {fraction} \| ([\d.]+ ± [\d.]+) \|"
        return "| **{}** | {} |".format(*re.findall(pattern, evidence, re.MULTILINE))

    def speed(mode: str) -> str:
        """Of convit_tiny, small, and base, relative to the plain ViT."""
        cells = (", ".join(f"{row[mode]['ratio']:.2f}" for row in gpu[name][:3]) for name in ("ours", TIMM))
        return "| **{}** (timm's ConViT: {}) | 1 (timm) |".format(*cells)

    demo, plain = (run[-1]["test_accuracy"] for run in (read_metrics(DEMO), runs("cifar10")["vit"]["metrics"]))
    batches = ", ".join(str(row["batch"]) for row in gpu["ours"][:3])
    batch_201 = model_rows("cuda-bf16", "scaling")["ours"][0]["infer"]["ratio"]
    tiny = [fp32["ours"][0][mode]["ratio"] for mode in ("infer", "train")]
    nano = [rows["ours"][2]["train"]["images_per_second"] for rows in (bf16, fp32)]
    says(
        "README.md",
        f"| CIFAR-10 test accuracy, 30 epochs, one seed | **{demo:.1f}%** | {plain:.1f}% |",
        five_seeds("10%"),
        five_seeds("100%"),
        f"tiny, small, base (batch {batches}) {speed('infer')}",
        f"| relative training speed, same setting {speed('train')}",
        f"with a batch of 201, `convit_tiny` infers at {batch_201:.2f};",
        f"in fp32, `convit_tiny` has {tiny[0]:.2f} at inference and {tiny[1]:.2f} in training.",
        f"({nano[0]:.0f} and {nano[1]:.0f} images/s on two cores",
    )


def test_sentences_about_the_benchmarks_equal_the_results():
    gpu, fp32, bf16 = map(model_rows, BENCHMARKS)
    table = ""
    for rows, setting in ((gpu, "bf16, H100"), (fp32, "fp32, CPU"), (bf16, "bf16, CPU")):
        for ours, timms in zip(rows["ours"], rows[TIMM], strict=True):
            cells = [f"{row[key]['ratio']:.2f}" for row in (ours, timms) for key in ("infer", "train", "memory")]
            name = f"`{ours['model']}`, {ours['size']} px, batch {ours['batch']}, {setting}"
            table += f"| {name} | {' | '.join(cells)} |\n"
    assert f"---|\n{table}\n" in DOCS["docs/benchmarks.md"]

    def relative(rows: dict[str, list[dict]], key: str, other: str, spec: str = ".2f", ours: str = "ours") -> str:
        """Our speed or memory relative to another variant, lowest to highest."""
        return span([a[key]["ratio"] / b[key]["ratio"] for a, b in zip(rows[ours], rows[other], strict=True)], spec)

    cpu = {variant: fp32[variant] + bf16[variant] for variant in fp32}
    scaling = model_rows("cuda-bf16", "scaling")
    all_gpu = {variant: gpu[variant] + scaling[variant] for variant in scaling}
    written_out = "ours, gpsa_layers=0"
    single = [model_rows(name, "scaling")["ours"][0] for name in ("cpu-fp32", "cpu-bf16")]
    single = [f"{row[mode]['ratio']:.2f}" for row in single for mode in ("infer", "train")]
    base = [f"{gpu[name][2][mode]['of_peak']:.0%}" for name in ("ours", PLAIN) for mode in ("train", "infer")]
    tera = float(benchmark("model-cuda-bf16")["header"]["matrix_product"].split()[0]) / 1000
    step = {}  # of the scaling rows
    for name in ("ours", PLAIN):
        ms = [1000 * row["batch"] / row["train"]["images_per_second"] for row in scaling[name]]
        of_peak = [100 * row["train"]["of_peak"] for row in scaling[name]]
        step[name] = f"{span(ms, '.0f')} ms, at {span(of_peak, '.0f')}%"
    first, last = scaling["ours"][0], {name: rows[-1] for name, rows in scaling.items()}
    assert [(row["batch"], row["size"]) for row in (first, last["ours"])] == [(201, 224), (24, 640)]
    mib = {name: f"{row['memory']['mib'] / row['batch']:.0f}" for name, row in last.items()}
    says(
        "docs/benchmarks.md",
        f"trains at {base[0]} and infers at {base[1]} of the measured peak of a matrix product ({tera:.0f} TFLOP/s;",
        f"the plain ViT of the same shape at {base[2]} and {base[3]}.",
        f"inference is {relative(gpu, 'infer', EXPLICIT, '.1f')} times as fast, and training "
        f"{relative(gpu, 'train', EXPLICIT, '.1f')} times.",
        f"takes {step['ours']} of the peak, and the plain ViT's {step[PLAIN]}.",
        f"trains {last['ours']['train']['ratio'] / last[TIMM]['train']['ratio']:.1f} times as fast as timm's ConViT, "
        f"with {mib['ours']} instead of {mib[TIMM]} MiB per image; the plain ViT needs {mib[PLAIN]} MiB.",
        "`convit_tiny` has {} and {} (inference, training) in fp32, and {} and {} in bf16.".format(*single),
        f"trains {relative(bf16, 'train', PLAIN, ours=written_out)} times as fast as timm's, and ConViT reaches "
        f"{relative(bf16, 'train', written_out)} of our plain ViT.",
        f"in the committed tables of the CPU {relative(cpu, 'infer', EXPLICIT)} times as fast at inference and "
        f"{relative(cpu, 'train', EXPLICIT)} times in training, with {relative(fp32, 'memory', EXPLICIT)} of their "
        f"memory in fp32 and {relative(bf16, 'memory', EXPLICIT)} in bf16; on the GPU, "
        f"{relative(gpu, 'infer', EXPLICIT)} and {relative(gpu, 'train', EXPLICIT)} times as fast, with "
        f"{relative(gpu, 'memory', EXPLICIT)} of their memory",
        f"missed on the GPU ({relative(all_gpu, 'infer', PLAIN)} at inference, {relative(all_gpu, 'train', PLAIN)} in "
        "training, over all rows of its table",
        f"met on the GPU ({relative(gpu, 'infer', TIMM, '.1f')} times at inference, "
        f"{relative(gpu, 'train', TIMM, '.1f')} in training).",
        f"missed, {relative(all_gpu, 'memory', PLAIN)} on the GPU, {relative(fp32, 'memory', PLAIN)} in fp32 on a CPU.",
        f"In bf16 on a CPU, {relative(bf16, 'memory', PLAIN)} include",
        f"`convit_tiny` has {gpu['ours'][0]['infer']['ratio']:.2f} with 256 images of 224 px, and "
        f"{first['infer']['ratio']:.2f} with 201.",
    )
    gib = [row["memory"]["mib"] / 1024 for row in gpu["ours"]]
    says(
        "docs/distributed.md",
        f"needs {relative(all_gpu, 'memory', PLAIN)} times the memory of the plain ViT of the same shape, on a GPU",
        f"takes {gib[0]:.1f} GiB for 256 images with `convit_tiny`, {gib[1]:.1f} GiB for 256 with `convit_small`, and "
        f"{gib[2]:.1f} GiB for 128 with `convit_base`",
    )


def contrasts(folder: str) -> Iterator[re.Match]:
    """The planned contrasts of a report that have a verdict, as they are printed."""
    cells = r"(?P<points>\S+) \((?P<ends>.+)\) \| \S+ \| (?P<p>\S+) \| \S+ \| (?P<verdict>.+)"  # p: adjusted
    page = (ROOT / f"results/{folder}/README.md").read_text()
    return re.finditer(rf"^\| .+ \| \d of 5 \| {cells} \|$", page, re.MULTILINE)


def test_planned_contrasts_decide_the_claims():
    text, (lead, growth, half, initial) = DOCS["docs/results.md"], contrasts("evidence")
    for contrast, start in (
        (lead, "On scarce data,"), (growth, "The lead grows"), (half, "Without gating, accuracy drops on 10%")
    ):  # fmt: skip
        row = re.search(rf"^\| {start}.*? \| (.*?) \| .*", text, re.MULTILINE)
        direction = "confirmed" if contrast["points"].startswith("+") else "contradicted"
        statuses = {"different": direction, "equivalent": "no difference"}
        assert row[1] == statuses.get(re.match("[a-z]+", contrast["verdict"])[0], "undecided")
        assert contrast["points"].removeprefix("+") in row[0]
    assert initial["points"].startswith("+") and initial["verdict"].startswith("different")  # "helps beyond their ..."
    lead, growth = contrasts("evidence-cpu")
    assert float(lead["p"]) < 0.001
    says(
        "docs/results.md",
        f"the first is {lead['verdict']} from 0 (paired t-test, adjusted p < 0.001), the second is {growth['verdict']} "
        f"({float(growth['p']):.2f})",
    )


def accuracy(setting: str) -> np.ndarray:
    """Of the grid, by seed and quarter of the training; the first column is before it."""
    metrics = [runs("evidence")[f"{setting}-seed{seed}"]["metrics"] for seed in grid.SEEDS]
    return np.array([[row["test_accuracy"] for row in run] for run in metrics])


def interval(values: np.ndarray) -> tuple[str, str]:
    """The mean and its 95% interval, as in "6.8" and "+5.5 to +8.0"."""
    mean, half = values.mean(), report.half_interval(values)
    return f"{mean:.1f}", span([mean - half, mean + half], "+.1f")


def test_every_interval_in_the_text_is_a_result():
    """With the mean before and the adjusted p behind it, as in "6.8 points (+5.5 to +8.0; adjusted p < 0.001)"."""
    results = {}  # adjusted p, by mean without its sign and interval
    for contrast in (*contrasts("evidence"), *contrasts("evidence-cpu")):
        results[contrast["points"].lstrip("+-"), contrast["ends"]] = float(contrast["p"])
    for pair in (("convit-100%", "vit-100%"), ("gates-0.73-10%", "vit-10%"), ("gates-0.5-10%", "vit-10%")):
        results[interval(np.subtract(*map(accuracy, pair))[:, -1])] = math.nan  # not planned: no p
    for part in ("10%", "100%"):
        leads = accuracy(f"convit-{part}") - accuracy(f"vit-{part}")
        results[interval(leads[:, -1] - leads[:, 1])] = math.nan  # its growth from the first quarter to the last
    results |= {(mean, ends.replace("+", "")): p for (mean, ends), p in results.items()}  # "cost 2.5 (1.3 to 3.8)"
    pattern = r"(?:\(|, |95%: |95% interval )([+-]?\d\.\d to [+-]?\d\.\d)(?:;[^.;)]* adjusted p ([=<]) (0\.\d+))?"
    found = 0
    for page in ("README.md", "docs/results.md", "docs/exercises.md"):
        text = unwrapped(page)
        for match in re.finditer(pattern, text):
            ends, sign, p = match.groups()
            mean, found = re.findall(r"\d+\.\d", text[: match.start()])[-1], found + 1
            assert (mean, ends) in results, f"{page}: {mean} {match[0]}"
            exact = results[mean, ends]
            assert not p or (exact < float(p) if sign == "<" else f"{exact:.{len(p) - 2}f}" == p), match[0]
    assert found > 20


def test_leads_over_the_training():
    leads = [accuracy(f"convit-{part}") - accuracy(f"vit-{part}") for part in ("10%", "100%")]
    on_10, on_100 = (", ".join(f"{mean:+.1f}" for mean in lead.mean(0)[1:]) for lead in leads)
    drops = [(quarters[:, 3] - quarters[:, 4]).mean() for quarters in map(accuracy, ("convit-10%", "vit-10%"))]
    demo, plain = (
        [row["test_accuracy"] for row in metrics] for metrics in (read_metrics(DEMO), runs("cifar10")["vit"]["metrics"])
    )
    lead = np.subtract(demo, plain)
    says(
        "docs/results.md",
        f"(ConViT by {drops[0]:.1f}, the plain ViT by {drops[1]:.1f} points, which",
        f"on 10%, it grows: {on_10} after each quarter (5 pairs; from",
        f"and on all images: {on_100} (5 pairs; by",
        f"in epoch {lead.argmax()} of 30: {lead.max():+.1f}, and {lead[-1]:+.1f} at the end (one pair",
        f"{leads[1][:, -1].mean():+.1f} after 10,000 steps (5 pairs), and {demo[-1]:.2f} - {plain[-1]:.2f} = "
        f"{lead[-1]:+.1f} after 30 epochs",
    )


def test_heads_of_the_grid():
    """Of the GPSA layers, after the last epoch."""

    def metrics(folder: str, start: str) -> list[list[dict]]:
        return [run["metrics"] for name, run in runs(folder).items() if name.startswith(start)]

    def heads(key: str, trained: list[list[dict]]) -> np.ndarray:
        """A statistic by run, layer, and head."""
        return np.array([run[-1]["heads"][key][:5] for run in trained], dtype=float)

    on_10, on_100, cpu_10, cpu_100 = (
        metrics(folder, f"convit-{part}-") for folder in ("evidence", "evidence-cpu") for part in ("10%", "100%")
    )
    demo, tiny = [read_metrics(DEMO)], [runs("tiny-imagenet-50")["convit"]["metrics"]]
    low = (heads("gate", [*demo, *tiny, *on_10, *on_100, *cpu_10, *cpu_100]) < 0.5).sum((1, 2))
    slow = heads("gate", metrics("evidence", "patterns-gate-lr-1-"))
    assert len(low) == 20 and len(slow) == 3 and slow.min() > 0.66
    center = [(heads("gate", trained)[:, :, 4] < 0.5).sum(0).tolist() for trained in (on_10 + on_100, cpu_10 + cpu_100)]
    assert center == [[0, 10, 10, 10, 10], [1, 8, 8, 8, 8]]  # the sentence about these runs in "Center taps"
    distance = [heads("non_locality", trained).mean(2) for trained in (on_10, on_100, cpu_10, cpu_100, demo, tiny)]
    last = [f"{(layers.argmax(1) == 4).sum()} of {len(layers)}" for layers in distance[:4]]
    assert distance[4].argmax() == 0 and distance[5].max() - distance[5][0, 3:].min() < 0.01
    lowest = [heads("gate", trained).mean(2).argmin(1) for trained in (on_10, on_100, demo, tiny)]
    late = [(layers >= 3).sum() for layers in lowest[:2]]
    assert [layer for layers in lowest for layer in layers if layer < 3] == [0] * 6 + [0, 1]  # six, demo, Tiny ImageNet
    says(
        "docs/results.md",
        f"{low.min()} to {low.max()} of 45 gates end below 0.5 in all twenty ConViTs on photos",
        f"none does in three runs (lowest gate: {slow.min():.2f})",
        f"layer 5 has the largest non-locality in {last[0]} seeds on 10% and {last[1]} on all images;",
        f"Layer 5 has the largest non-locality in {last[2]} seeds on 10%, and in {last[3]} on all images.",
        f"| seen in {sum(late)} of 12 | layer 4 or 5 has the lowest mean gate in {late[0]} of 5 seeds on 10% and "
        f"{late[1]} of 5 on all images;",
    )


def test_tiny_imagenet():
    last = {name: run["metrics"][-1] for name, run in runs("tiny-imagenet-50").items()}
    labels = {"convit": "ConViT | 0.001", "vit": "plain ViT | 0.001", "vit-lr4e-3": "plain ViT | 0.0005"}
    for name, label in labels.items():
        distance = np.mean(last[name]["heads"]["non_locality"], axis=1)
        cells = [f"{last[name]['test_accuracy']:.1f}", *(f"{layer:.2f}" for layer in distance)]
        assert f"| {label} | {' | '.join(cells)} |\n" in DOCS["docs/results.md"] and last[name]["epoch"] == 20
    convit, vit, slower = (last[name]["test_accuracy"] for name in labels)
    says(
        "docs/results.md",
        f"by {convit - vit:.1f} points at its own learning rate, which was not tuned here,",
        f"and by {convit - slower:.1f} points over the plain ViT's better one of two",
    )
    low = np.array(last["convit"]["heads"]["gate"][:5]) < 0.5
    assert low.sum() == 6 and low[1:, 4].all() and low[[1, 4], 6].all()  # the heads that the page lists


def test_steps_that_the_patterns_take():
    """The list below their table."""
    table = re.findall(r"^\| ([a-z][\w.-]+) \| (\w+, \w+, \w+) \|", DOCS["docs/results.md"], re.MULTILINE)
    reached = {arm: [float(steps.replace("never", "inf")) for steps in cell.split(", ")] for arm, cell in table}
    assert reached.keys() == grid.PATTERN_ARMS.keys()
    never = {arm: steps.count(math.inf) for arm, steps in reached.items() if math.inf in steps}
    assert never == {"gates-1": 1, "gate-lr-1": 1, "gates-1-lr0.003": 3}
    slow = [steps for steps in reached["gates-1"] + reached["gates-1-lr0.0003"] if steps < math.inf]
    *fast, slowest = sorted(steps for arm in ("learned", "vit", *grid.VARIANTS) for steps in reached[arm])
    with_content = [steps for arm in reached if not arm.startswith("gates-1") for steps in reached[arm]]
    assert slowest == max(reached["learned"]) and sorted(with_content)[-3:] == [fast[-1], slowest, math.inf]
    says(
        "docs/results.md",
        f"they need {min(slow):.0f} to {max(slow):,.0f} steps.",
        f"{len(with_content) - 2} of {len(with_content)} runs need {span(fast, '.0f')}",
        f"one needs {slowest:,.0f}, and one does not learn the task",
        f"all need {span(fast, '.0f')} steps, but for one seed with learned gates, which needs {slowest:,.0f}.",
    )


def test_times_of_the_grid():
    cpu, page = runs("evidence-cpu").values(), DOCS["docs/results.md"]
    hours = sum(entry.get("wall_clock_s", 0) for run in cpu for entry in run["provenance"]) / 3600
    total = 13 * 5_000 + 40 * 10_000 + 24 * 3_120  # steps
    documented = int(re.search(r"into runs/grid: about (\d+) hours", page)[1])
    assert documented == pytest.approx(total * hours / sum(run["metrics"][-1]["step"] for run in cpu), rel=0.1)
    for file in ("experiments/reproduce.py", "CONTRIBUTING.md"):
        says(file, f"about {documented} hours of one CPU core")

    gpu = [run["provenance"][0] for run in runs("evidence").values() if "H100" in run["provenance"][0]["device"]]
    starts = [datetime.fromisoformat(entry["started"]) for entry in gpu]
    ends = [start + timedelta(seconds=entry["wall_clock_s"]) for start, entry in zip(starts, gpu, strict=True)]
    minutes = (max(ends) - min(starts)).total_seconds() / 60
    at_once = max(sum(start <= now < end for start, end in zip(starts, ends, strict=True)) for now in starts)
    says(
        "docs/results.md",
        f"Our {len(gpu)} runs on the GPU (30 of 10,000 steps and 24 of 3,120;",
        f"took {minutes:.0f} minutes, with up to {at_once} processes on 16 CPU cores",
    )


def test_measurements_in_sentences_equal_the_results():
    demo, vit = read_metrics(DEMO), runs("cifar10")["vit"]["metrics"]
    minutes = [sum(50_000 / row["images_per_second"] for row in run[1:]) / 60 for run in (demo, vit)]
    says("README.md", f"took {minutes[0]:.1f} minutes")
    says("docs/results.md", f"| **84.1** | {minutes[0]:.1f} minutes |", f"| 78.2 | {minutes[1]:.1f} minutes |")

    last = {variant: rows[-1] for variant, rows in model_rows("cpu-fp32", "scaling").items()}  # 640 px, one image each
    ours, plain, timms = (
        f"{1 / last[name]['train']['images_per_second']:.2f} s and {last[name]['memory']['mib']:.0f} MiB"
        for name in ("ours", PLAIN, TIMM)
    )
    loading = benchmark("data_loading")["seconds"]
    ours_s, plain_s, torchvision_s, torchvision_plain_s = (
        loading[f"{name}, in the worker{suffix}"]
        for name in ("ours", "torchvision")
        for suffix in ("", ", without RandAugment")
    )
    viewer = benchmark("viewer")
    samples = list(viewer["milliseconds"].values())
    _, hover, snapshot, layer, upload, _, clients = map(statistics.median, samples)
    slow = statistics.quantiles(samples[-1], n=20)[-1] / 1000
    says(
        "docs/benchmarks.md",
        f"takes {ours} per image, against {plain} for the plain ViT and {timms} for timm's ConViT",
        f"reads {1 / ours_s:.0f} images/s with RandAugment, {torchvision_s / ours_s:.2f} times as many as one with "
        f"torchvision's transforms, and {1 / plain_s:.0f} without it, {torchvision_plain_s / plain_s:.2f} times.",
        f"in {hover:.1f} ms (median); changing the snapshot or the layer takes {snapshot:.0f} and {layer:.0f} ms, an "
        f"upload of 12 megapixels {upload / 1000:.2f} s",
        f"response takes {clients:.0f} ms, the 95th percentile {slow:.2f} s",
    )
    says(
        "docs/viewer.md",
        f"({hover:.1f} ms, median)",
        f"in {clients:.0f} ms (median; 95th percentile: {slow:.1f} s)",
        f"used {viewer['mebibytes']['after']:.0f} MiB",
    )


def test_numbers_of_the_demos():
    demo = read_metrics(ROOT / "demo/patterns")
    before, after_8, after_10, end = (f"{demo[epoch]['test_accuracy']:.1f}%" for epoch in (0, 8, 10, -1))
    low = np.array([row["heads"]["gate"][:5] for row in demo], dtype=float) < 0.5
    patterns, cifar, committed = (
        json.loads((ROOT / name / "masking.json").read_text())["masked_in_first_layers"]
        for name in ("demo/patterns", "demo/cifar10", "results/reproduce")
    )
    assert cifar == committed
    content, position = (f"{patterns[part][-1]:.1f}%" for part in ("content", "position"))  # masked in all GPSA layers
    says(
        "demo/patterns/README.md",
        f"{before} before training, {after_8} after epoch 8, {after_10} after epoch 10, {end} at the end",
        f"in epoch {low.any((1, 2)).argmax()}; {low[-1].sum()} of 45 end",
        f"{content} if all gates are set to 1 (position only), {position} if all are set to 0 (content only)",
    )
    says(
        "docs/viewer.md",
        f"on the patterns drops from {patterns['content'][0]:.1f} to {content}, and on CIFAR-10 from "
        f"{cifar['content'][0]:.1f} to {cifar['content'][-1]:.1f}%",
    )
    heads = read_metrics(DEMO)[-1]["heads"]
    gate, strength = (np.array(heads[key][:5]) for key in ("gate", "strength"))
    says(
        "docs/results.md",
        f"[{cifar['content'][-1]:.1f}% and {cifar['position'][-1]:.1f}%](#masking-content-or-position); on the "
        f"patterns, [{content} and {position}]",
        f"{(gate < 0.5).sum()} of the 45 heads end with a gate below 0.5",
        f"{(gate > 0.7311).sum()} heads end above their initial gate",
        f"from 1 at initialization to {strength.max():.2f} or lower",
        f"its mean attention distance is {heads['non_locality'][1][4]:.2f} patches",
    )


def test_what_the_heads_of_the_demo_do():
    """The list below the table of gates in docs/results.md."""
    metrics = read_metrics(DEMO)
    gate, strength, distance = (
        np.array([record["heads"][name] for record in metrics], dtype=float)
        for name in ("gate", "strength", "non_locality")
    )
    first_below = [np.argmax(gate[:, layer] < 0.5, axis=0) + 99 * (gate[:, layer] >= 0.5).all(0) for layer in range(5)]
    assert [epochs.argmin() for epochs in first_below] == [4] * 5  # head 5
    assert (gate[-1, :5] < 0.5).sum(1).tolist() == [5, 0, 2, 1, 1]  # "five in layer 1, two in layer 3, one each ..."
    center, layers = gate[-1, :, 4], distance.mean(2)
    says(
        "docs/results.md",
        f"after {span([epochs.min() for epochs in first_below], '.0f')} epochs",
        "({:.2f}, {:.2f}, {:.2f}, and {:.2f})".format(*center[[0, 2, 3, 4]]),
        f"rises again to {center[1]:.2f}, but",
        f"slightly negative ({strength[-1, 1, 4]:.2f})",
        f"above the {uniform_non_locality((8, 8)):.2f} of uniform attention",
        f"grows from {layers[0, 0]:.1f} to {layers[-1, 0]:.1f} in layer 1 and to {layers[-1, 4]:.1f} in layer 5",
        f"stay between {span(layers[1:, 1:4].ravel()).replace(' to ', ' and ')} after the first epoch",
        f"The SA layers end at {layers[-1, 5]:.1f} and {layers[-1, 6]:.1f}",
    )


def test_single_runs_and_tuning():
    def lead(folder: str, start: str) -> str:
        """Of the best learning rate over the second best."""
        tuning = [run["metrics"] for name, run in runs(folder).items() if name.startswith(start)]
        second, best = sorted(metrics[-1]["test_accuracy"] for metrics in tuning)[-2:]
        return f"{best - second:.1f}"

    by_setting = [lead("tuning", f"{model}-") for model in grid.MODELS]
    by_rate = [lead("evidence", f"tune-{model}-{part}-") for part in ("10%", "100%") for model in grid.MODELS]
    masking = json.loads((ROOT / "results/reproduce/masking.json").read_text())
    content, position = (curve[-1] for curve in masking["masked_in_first_layers"].values())
    says(
        "docs/results.md",
        "second best by {} (ConViT) and {} points (plain ViT); the".format(*by_setting),
        "by {} (ConViT) and {} points (plain ViT) on 10%, and by {} and {} points on all images".format(*by_rate),
        f"it still has {content:.1f}%, without position {position:.1f}%",
        f"our model has {masking['position_embedding_masked']:.1f}%",
    )
