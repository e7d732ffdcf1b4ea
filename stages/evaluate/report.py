"""What `evaluate` found, as tables, pictures and one page. No torch here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from orchestrator.data.curation.mix import effective_number
from orchestrator.evaluation.metric import Figure, Figures
from orchestrator.evaluation.report.clusters import cluster_shares
from orchestrator.evaluation.report.figures import bars, curves
from orchestrator.evaluation.report.html import (
    Picture,
    Section,
    SectionPart,
    Table,
    Text,
    Tile,
    markdown_table,
    page,
)
from orchestrator.stages.evaluate.results import (
    HEALTH,
    NUM_ENDS,
    History,
    Results,
    TextRetrieval,
    ZeroShot,
    file_name,
)
from orchestrator.stages.evaluate.verdict import verdict

_PCA_NOTE = (
    "The first three principal components of the patch features as red, green and blue, at twice the size "
    "of training. All photos of one model share them, so a colour means the same in all its maps."
)

_MAPS_NOTE = (
    "Each patch of a photo in the space of the texts, at twice the size of training: bright is near the text at "
    "the head of the column, dark is far. Every column has its own scale, the same for all photos."
)


_INTERVALS = "Brackets hold 95 % bootstrap intervals over pictures."


def write(results: Results, out: Path) -> None:
    """Writes table.json, table.md, report.html and the pictures but for the PCA maps, into `out`."""
    record = {
        "pipeline": results.title,
        "knn": {
            "k": results.k,
            "num_photos": results.num_photos,
            "groups": dict(results.groups),
            "rows": [score.record() for score in results.scores],
        },
        "retrieval": results.retrieval.record() if results.retrieval else None,
        "zero_shot": results.zero_shot.record() if results.zero_shot else None,
        "dense_health": results.health(),
        "sharing": dict(results.sharing),
        "clusters": {
            one.name: {"effective": one.effective, "left_out": one.left_out}
            for one in (*results.pool, *results.drawn.values())
        },
    }
    if results.measured:
        record["metrics"] = {title: dict(by_model) for title, by_model in results.measured.items()}
    if any(_is_sure(figure) for _, _, _, figure in _all_figures(results)):
        record["figures"] = {
            title: {
                model: {name: asdict(figure) for name, figure in found.items()}
                for model, found in by_model.items()
            }
            for title, by_model in results.figures.items()
        }
    if results.split is not None:
        record["split"] = dict(results.split)
    (out / "table.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    sections = _sections(results, out)
    (out / "table.md").write_text(_markdown(results.title, sections))
    subtitle = f"Evaluation on {results.num_unique} unique photos, " + (
        "all training-free"
        if results.split is None
        else ", ".join(f"{count} {name}" for name, count in results.split.items())
    )
    (out / "report.html").write_text(
        page(f"{results.title}: evaluation", subtitle, _tiles(results), sections)
    )


def _sections(results: Results, out: Path) -> list[Section]:
    sections = [_knn(results, out)]
    for title, by_model in results.measured.items():
        figures = results.figures.get(title)
        section = _measured((title, by_model)) if not figures else _figures(title, figures, out)
        drawn = results.drawn_by.get(title, {})
        maps = [
            block
            for row, path in drawn.items()
            for block in (Text(row), Picture(path, alt=f"{title}, {row}"))
        ]
        sections.append(Section(section.title, [*section.blocks, *maps]))
    if results.backbones:
        sections.append(_dense(results, out))
    if results.pca:
        maps = [
            block for name, path in results.pca.items() for block in (Text(name), Picture(path, alt=name))
        ]
        sections.append(Section("PCA of patch features", [Text(_PCA_NOTE), *maps]))
    if results.retrieval:
        sections.append(_retrieval(results.retrieval, "" if results.split is None else "test "))
    if results.zero_shot:
        sections.append(_zero_shot(results.zero_shot, "" if results.split is None else "test "))
    if results.text_maps:
        picture = Picture(results.text_maps, "Photos, and how similar their patches are to each text")
        sections.append(Section("Where a text is", [Text(_MAPS_NOTE), picture]))
    sections += [*_datasets(results), *_drawn(results, out)]
    training = _training(results, out)
    sections += [training] if training.blocks else []
    keys = [(name, key[:16]) for name, key in reversed(list(results.keys.items()))]
    if keys:
        sections.append(Section("Lineage", [Table(("stage", "content key"), keys, num_names=2)]))
    return sections


def _knn(results: Results, out: Path) -> Section:
    if results.split is not None and results.scores:
        return _split_knn(results, out)
    title = f"{results.k}-nearest-neighbour accuracy"
    if not results.scores:
        note = "The photos have no labels to vote with: fewer than two groups of at least two photos."
        return Section(title, [Text(note)])
    bars(
        [(score.name, score.accuracy, score.family) for score in results.scores[1:]],
        out / "knn.png",
        f"Leave-one-out {results.k}-NN accuracy, n={results.num_photos}",
        {"majority group": results.scores[0].accuracy},
        [_around(score.figure or Figure(score.accuracy)) for score in results.scores[1:]],
    )
    note = (
        f"Leave-one-out on n={results.num_photos} photos of the {len(results.groups)} largest groups. The "
        "curation removed copies of photos, so none can vote for itself. CLS features, cosine similarity, one vote per "
        f"neighbour. {_INTERVALS} So do the error bars. Training used these photos, but no labels. Shaded: the "
        "students, and their teacher if it was trained here."
    )
    rows = [
        (
            score.name,
            str(score.figure or Figure(score.accuracy)),
            score.model,
            _count(score.num_parameters),
            "" if score.image_size is None else f"{score.image_size} px",
            "" if score.dim is None else str(score.dim),
        )
        for score in results.scores
    ]
    strong = [at for at, score in enumerate(results.scores) if score.student or score is results.teacher]
    header = ("features", "accuracy", "model", "weights", "photos at", "dim")
    picture = Picture(out / "knn.png", alt=f"The accuracy of each row of the table as a bar, {title}")
    said = [Text(text)] if (text := verdict(results)) else []
    return Section(title, [*said, Text(note), Table(header, rows, strong=strong), picture])


def _split_knn(results: Results, out: Path) -> Section:
    """The k-NN table with a split: both kinds of vote, intervals, and what validation chose."""
    title = "k-nearest-neighbour accuracy, test"
    shown = [score for score in results.scores if score.weighted is not None and score.figure is not None]
    bars(
        [(score.name, score.accuracy, score.family) for score in shown],
        out / "knn.png",
        f"k-NN accuracy on test photos, n={results.num_photos}",
        {"majority group": results.scores[0].accuracy},
        [_around(score.figure) for score in shown if score.figure is not None],
    )
    note = (
        f"n={results.num_photos} test photos of {len(results.groups)} labels, each judged by its nearest training "
        "photos: with one vote each, or with votes weighted by exp(cosine / temperature). Validation photos chose the "
        f"number of neighbours. {_INTERVALS} Training of the backbone used no labels. Shaded: the students, and their "
        "teacher if it was trained here."
    )
    rows = [
        (
            score.name,
            str(score.figure),
            "" if score.weighted is None else str(score.weighted),
            score.model,
            _count(score.num_parameters),
            "" if score.image_size is None else f"{score.image_size} px",
            "; ".join(one.note for one in (score.figure, score.weighted) if one is not None),
        )
        for score in results.scores
    ]
    strong = [at for at, score in enumerate(results.scores) if score.student or score is results.teacher]
    header = ("features", "accuracy", "weighted", "model", "weights", "photos at", "chosen: plain; weighted")
    picture = Picture(out / "knn.png", alt=f"The accuracy of each row of the table as a bar, {title}")
    return Section(title, [Text(note), Table(header, rows, strong=strong), picture])


def _figures(title: str, by_model: Mapping[str, Figures], out: Path) -> Section:
    """The figures of one metric, a row a model, with intervals as far as there are any."""
    found = {name: figure for figures in by_model.values() for name, figure in figures.items()}
    names = list(found)
    has_notes = any(figure.note for figures in by_model.values() for figure in figures.values())
    rows = [
        (
            model,
            *(str(figures[name]) if name in figures else "" for name in names),
            *([next((one.note for one in figures.values() if one.note), "")] if has_notes else []),
        )
        for model, figures in by_model.items()
    ]
    of = sorted({f"{one.split}, n={one.num}" for one in found.values() if one.split})
    note = (
        f"Of each model: {'; '.join(of)}. "
        if of
        else "A metric of a package of yours, on the features of each model."
    )
    if any(_is_sure(figure) for figure in found.values()):
        note += _INTERVALS
    table = Table(("features", *names, *(["chosen"] if has_notes else [])), rows)
    blocks: list[SectionPart] = [Text(note), table]
    first = names[0] if names else ""
    shown = [(model, figures[first]) for model, figures in by_model.items() if first in figures]
    if shown and all(_is_sure(figure) for _, figure in shown):
        path = out / f"metric_{file_name(title)}.png"
        bars(
            [(model, figure.value, "figure") for model, figure in shown],
            path,
            f"{title}: {first}",
            errors=[_around(figure) for _, figure in shown],
        )
        blocks.append(Picture(path, alt=f"The figures of the column {first} as bars"))
    return Section(title, blocks)


def _all_figures(results: Results) -> Iterator[tuple[str, str, str, Figure]]:
    """Metric, model, name and figure."""
    for title, by_model in results.figures.items():
        for model, figures in by_model.items():
            for name, figure in figures.items():
                yield title, model, name, figure


def _is_sure(figure: Figure) -> bool:
    """Whether it has an interval."""
    return figure.low is not None and figure.high is not None


def _around(figure: Figure) -> tuple[float, float]:
    """How far the interval goes below and above the figure."""
    low = figure.value if figure.low is None else figure.low
    high = figure.value if figure.high is None else figure.high
    return max(0.0, figure.value - low), max(0.0, high - figure.value)


def _measured(metric: tuple[str, Mapping[str, Mapping[str, float]]]) -> Section:
    """The figures of one metric of a user's package, a row a model."""
    title, by_model = metric
    figures = list(dict.fromkeys(figure for found in by_model.values() for figure in found))
    rows = [
        (model, *(f"{found[figure]:.4g}" if figure in found else "" for figure in figures))
        for model, found in by_model.items()
    ]
    note = "A metric of a package of yours, on the features of each model."
    return Section(title, [Text(note), Table(("features", *figures), rows)])


def _dense(results: Results, out: Path) -> Section:
    path = out / "dense_health.png"
    picture = _chained(results.backbones, HEALTH, path, "Dense features over the backbone's stages")
    rows = [
        (
            kind,
            str(len(results.backbones[kind])),
            *(f"{ends[at]:.3f}" for ends in health.values() for at in ends),
        )
        for kind, health in results.health().items()
    ]
    header = ["stage", "steps", *(f"{name}, {at}" for name in HEALTH.values() for at in ("first", "last"))]
    note = (
        "Long training makes patches grow similar to CLS (a rising cosine) and lose their place (falling "
        "locality: near patches are no longer more alike than distant ones). Gram anchoring counteracts this. "
        f"First and last are means over {NUM_ENDS} steps of the metrics that training logged."
    )
    return Section("Dense health", [Text(note), Table(header, rows), *picture])


def _retrieval(found: TextRetrieval, of: str) -> Section:
    names = {"image_to_text": "photo → name", "text_to_image": "name → photo"}
    rows = [
        (title, *(str(found.recalls[f"{name}_recall_at_{k}"]) for k in found.chance))
        for name, title in names.items()
    ]
    rows.append(("by chance", *(f"{share:.3f}" for share in found.chance.values())))
    note = (
        f"{found.num_pairs} {of}photos and their names; a hit is any pair of the same name. {_INTERVALS} Training "
        "saw these pairs: the figures show how well they were learned, not how well unseen photos would do."
    )
    table = Table(("direction", *(f"recall@{k}" for k in found.chance)), rows)
    return Section("Text retrieval", [Text(note), table])


def _zero_shot(found: ZeroShot, of: str) -> Section:
    rows = [("mean of all templates", found.accuracy), *found.by_template.items()]
    rows += [("always the largest group", found.majority), ("by chance", Figure(1 / found.num_classes))]
    note = (
        f"{found.num_photos} {of}photos, each given to the one of {found.num_classes} labels whose text is nearest. "
        f"{_INTERVALS} No label was trained on, but the photos and their names were."
    )
    table = Table(("text", "accuracy"), [(name, str(figure)) for name, figure in rows], strong=[0])
    return Section("Zero-shot classes", [Text(note), table])


def _drawn(results: Results, out: Path) -> list[Section]:
    """What training was trained on; nothing without clusters."""
    numbers = sorted(results.pool[0].by_cluster) if results.pool else []
    if len(numbers) < 2 or not results.drawn:
        return []
    backbone = [results.drawn[kind] for kind in results.backbones if kind in results.drawn]
    trained = backbone or list(results.drawn.values())
    drawn = [sum(one.by_cluster.get(number, 0) for one in trained) for number in numbers]
    lines = {one.name: [one.by_cluster.get(number, 0) for number in numbers] for one in results.pool}
    path = out / "clusters.png"
    series = {
        f"{name}: {effective_number(counts):.1f} of {len(numbers)} clusters in effect": counts
        for name, counts in (*lines.items(), ("drawn", drawn))
    }
    cluster_shares({"Raw, chosen, drawn": series}, path)
    rows = [
        (one.name, f"{one.total}", f"{one.effective:.1f}", f"{100 * one.left_out:.1f} %")
        for one in (*results.pool, *results.drawn.values())
    ]
    note = (
        f"The index has {len(numbers)} clusters. Clusters in effect are exp(entropy): the number of equally large "
        "clusters that would be as diverse. Stages draw the photos that the curation chose; those that it left "
        "out are drawn only by stages whose `mix` or `homogeneous` names them. In the chart, `drawn` is the sum of "
        f"{', '.join(one.name for one in trained)}."
    )
    header = ("what", "photos or draws", "clusters in effect", "left out by the curation")
    picture = Picture(path, "Share of each cluster in the raw pool, in what was chosen and in what was drawn")
    return [Section("What training drew", [Text(note), Table(header, rows), picture])]


def _datasets(results: Results) -> list[Section]:
    """What became of every file of the datasets; nothing of an index that an older version made."""
    if not results.accounts:
        return []
    note = (
        "Every file below the datasets' folders. Files of other data, such as texts and tables, are left out as a "
        "matter of course; all names are in the `provenance.parquet` of the curation."
    )
    rows = [
        (one.source, kind, reason, f"{count:,}")
        for one in results.accounts
        for kind, reasons in (
            ("taken", {"": one.taken}),
            *((kind, one.left_out[kind]) for kind in one.by_kind),
        )
        for reason, count in reasons.items()
    ]
    table = Table(("dataset", "what became of files", "reason", "files"), rows, num_names=3)
    return [Section("What the datasets hold", [Text(note), table])]


def _training(results: Results, out: Path) -> Section:
    title = "Loss of the backbone's stages"
    blocks: list[SectionPart] = [
        *_chained(results.backbones, {"loss": "loss"}, out / "losses_backbone.png", title)
    ]
    for family, prefix in (("students", "student "), ("text", "align_text")):
        lines = {
            name.removeprefix("student "): _column(history, "loss")
            for name, history in results.heads.items()
            if name.startswith(prefix)
        }
        blocks += _picture(lines, out / f"losses_{family}.png", f"Loss of {family}", "loss")
    per_image = results.sharing.get("teacher_forwards_per_image")
    if per_image is not None:
        blocks.append(Text(f"Teacher forward passes per image, for all students together: {per_image:.3f}."))
    return Section("Training", blocks)


def _chained(
    backbones: Mapping[str, History], names: Mapping[str, str], path: Path, title: str
) -> list[Picture]:
    """Lines through all backbone stages, one stage's steps after another's, and marks where stages begin."""
    series: dict[str, tuple[list[float], list[float]]] = {title: ([], []) for title in names.values()}
    marks: dict[str, float] = {}
    start = 0
    for kind, history in backbones.items():
        marks[kind] = start
        for name, label in names.items():
            steps, values = _column(history, name)
            series[label][0].extend(start + step for step in steps)
            series[label][1].extend(values)
        start += max((int(record["step"]) for record in history), default=0)
    return _picture(series, path, title, " and ".join(names.values()), marks)


def _picture(
    series: Mapping[str, tuple[list[float], list[float]]],
    path: Path,
    title: str,
    ylabel: str,
    marks: Mapping[str, float] | None = None,
) -> list[Picture]:
    """The drawn curves, or nothing where there are no points (tracking may lose records)."""
    if not any(steps for steps, _ in series.values()):
        return []
    curves(series, path, title, ylabel, marks)
    return [Picture(path, alt=title)]


def _column(history: History, name: str) -> tuple[list[float], list[float]]:
    found = [
        (float(record["step"]), record["metrics"][name]) for record in history if name in record["metrics"]
    ]
    return [step for step, _ in found], [value for _, value in found]


def _tiles(results: Results) -> list[Tile]:
    best = max(results.students.values(), key=lambda score: score.accuracy, default=None)
    scores = {
        "teacher": results.teacher,
        "best student": best,
        "trained alone": results.last("own backbone"),
        "raw pixels": results.named("baseline", 1),
        # Of the same model at the same size: others' are not a baseline of it.
        "random weights": results.untrained(best or results.teacher),
    }
    tiles = [
        Tile(
            f"{f'{results.k}-NN' if results.split is None else 'k-NN on test'}, {name}",
            f"{score.accuracy:.3f}",
            score.student or score.model,
        )
        for name, score in scores.items()
        if score is not None
    ]
    if results.retrieval:
        recall, chance = results.retrieval.recalls["image_to_text_recall_at_5"], results.retrieval.chance[5]
        tiles.append(Tile("recall@5, photo → name", f"{recall.value:.3f}", f"by chance {chance:.3f}"))
    return tiles


def _markdown(title: str, sections: Sequence[Section]) -> str:
    parts = [f"# {title}: evaluation\n"]
    for section in sections:
        texts = [
            block.text + "\n" if isinstance(block, Text) else markdown_table(block)
            for block in section.blocks
            if not isinstance(block, Picture)
        ]
        parts += [f"## {section.title}\n", *texts] if texts else []
    return "\n".join(parts)


def _count(number: int | None) -> str:
    if number is None:
        return ""
    return f"{number / 1e6:.2f} M" if number >= 1e5 else f"{number / 1e3:.1f} k"
