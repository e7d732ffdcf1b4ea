"""`embed` and `search`: what a finished model is used for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.terminal import console

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.inference.embed_folder import Embedded

_UNREADABLE_SHOWN = 3

_Tracking = Annotated[
    str | None,
    typer.Option(
        help="The address of the MLflow server or database, for a registered model. "
        "Default: sqlite:///runs/mlflow.db.",
        envvar="MLFLOW_TRACKING_URI",
        show_default=False,
    ),
]
_Size = Annotated[
    int | None,
    typer.Option(
        help="The side at which images are seen, in pixels; a multiple of the model's patch. "
        "Default: the model's training size.",
        min=1,
        show_default=False,
    ),
]
_Batch = Annotated[int, typer.Option(help="The number of images per forward pass.", min=1)]
_Loaders = Annotated[
    int | None,
    typer.Option(
        help="The number of threads that read images. Default: the number of cores, at most 8.",
        min=1,
        show_default=False,
    ),
]


def embed(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="The folder of images. Subfolders are searched, too.", show_default=False
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="A registered model, as NAME@ALIAS, NAME:VERSION or NAME (its champion, or its newest version "
            "if there is none), or a folder with a model.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="The Parquet file to write, with a row for each image.",
            show_default=False,
        ),
    ],
    size: _Size = None,
    batch: _Batch = 32,
    loaders: _Loaders = None,
    tracking: _Tracking = None,
) -> None:
    """Embed a folder of images: a Parquet file with the path, sha256, size and vector of each."""
    import time

    from rich.text import Text

    from orchestrator import disk
    from orchestrator.cli.image_progress import ImageProgress
    from orchestrator.data.sources.folder import list_folder, shown
    from orchestrator.inference.embed_folder import embed_folder, made_of
    from orchestrator.inference.embeddings import checked_target
    from orchestrator.inference.forward import on_device
    from orchestrator.inference.model import checked_loaders, embedding_side, load_weights
    from orchestrator.inference.reference import locate, weights_digest
    from orchestrator.units import duration

    began = time.monotonic()
    folder, out = disk.named(folder), checked_target(disk.named(out))
    listing = list_folder(folder)
    located = locate(model, tracking)
    loaded = on_device(load_weights(located.path))
    made = made_of(folder, listing, located.name, weights_digest(located.path), embedding_side(loaded, size))
    with ImageProgress(console(stderr=True)) as progress:
        found = embed_folder(
            loaded, listing, out, made, batch=batch, loaders=checked_loaders(loaders), progress=progress
        )
    terminal = console()
    text = f" {found.num_images:,} images of {shown(str(folder))} are in {shown(str(out))}: vectors of {found.dim} "
    rate = (found.num_images - found.num_before) / progress.seconds
    text += f"values, in {duration(time.monotonic() - began)}, {rate:,.1f} images/s"
    terminal.print(Text("✓", "green").append(text, "default"), soft_wrap=True)
    _print_account(terminal, found)


def _print_account(terminal: Console, found: Embedded) -> None:
    """What became of the files that this call embedded nothing of."""
    from rich.text import Text

    from orchestrator.inference.embed_folder import by_reason

    if found.num_before:
        text = f"  {found.num_before:,} of them were embedded before an earlier command was interrupted"
        terminal.print(Text(text, "bright_black"), soft_wrap=True)
    if found.unreadable:
        text = f" {len(found.unreadable):,} image files cannot be read: {by_reason(found.unreadable)}"
        terminal.print(Text("!", "yellow").append(text, "default"), soft_wrap=True)
        for item in found.unreadable[:_UNREADABLE_SHOWN]:
            terminal.print(Text(f"  {item.path}: {item.reason}", "bright_black"), soft_wrap=True)
    if found.left_out:
        count = numbered(len(found.left_out), "other file is not an image", "other files are not images")
        text = f"  {count}: {by_reason(found.left_out)}"
        terminal.print(Text(text, "bright_black"), soft_wrap=True)


def search(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER_OR_PARQUET",
            help="The folder of images to search, or a file that [bold]orchestrator embed[/] wrote.",
            show_default=False,
        ),
    ],
    photo: Annotated[
        Path | None,
        typer.Argument(metavar="[PHOTO]", help="The image to which others are compared.", show_default=False),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="A text instead of an image, for a model with a text tower.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="The model, as for [bold]orchestrator embed[/]. Default: the model that the file was made with.",
            show_default=False,
        ),
    ] = None,
    top: Annotated[int, typer.Option(help="The number of images to print.", min=1)] = 10,
    size: _Size = None,
    batch: _Batch = 32,
    loaders: _Loaders = None,
    tracking: _Tracking = None,
) -> None:
    """Print the images that are nearest to an image or a text, with their cosine similarities.

    A folder is embedded first. Its vectors are kept in the cache, so the next search in it is immediate.
    """
    from rich.text import Text

    from orchestrator import disk
    from orchestrator.cli.image_progress import ImageProgress
    from orchestrator.data.sources.folder import shown
    from orchestrator.inference.model import checked_loaders
    from orchestrator.inference.search import search as find

    with ImageProgress(console(stderr=True)) as progress:
        found = find(
            disk.named(source),
            photo=None if photo is None else disk.named(photo),
            text=text,
            top=top,
            model=model,
            tracking=tracking,
            size=size,
            batch=batch,
            loaders=checked_loaders(loaders),
            progress=progress,
        )
    terminal = console()
    for match in found.matches:
        line = Text(f"{match.similarity:7.3f}  ", "cyan").append(
            shown(str(found.folder / match.path)), "default"
        )
        terminal.print(line, soft_wrap=True)
    count = numbered(found.num_unreadable, "image could not be read", "images could not be read")
    unreadable = f"; {count}" if found.num_unreadable else ""
    note = f"{len(found.matches)} of {found.num_images:,} images, by cosine similarity{unreadable}"
    console(stderr=True).print(Text(note, "bright_black"), soft_wrap=True)


def numbered(count: int, one: str, several: str) -> str:
    """A number and what it is of: `1 image could not be read`, `1,200 images could not be read`."""
    return f"{count:,} {one if count == 1 else several}"
