"""How a registered model is spelled, and which version that means: the same for every command, key and function.

    NAME@ALIAS      the version that has the alias now
    NAME:VERSION    a version by its number
    NAME            the champion, or the newest finished version if there is none

MLflow's own addresses mean the same, `models:/NAME@ALIAS` and `models:/NAME/VERSION`. Where no path can be meant, so
does NAME/VERSION.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator import disk
from orchestrator.errors import UserError, nearest, shortened

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

CHAMPION = "champion"
"""The alias that a bare name means, and that `publish` sets by default."""

SPELLINGS = "NAME@ALIAS, NAME:VERSION or NAME"

_ADDRESS = "models:/"
_PARTS = re.compile(r"([^@:/]*)(?:([@:/])(.*))?", re.DOTALL)
_PART = re.compile(r"[^@:/\\]+")


@dataclass(frozen=True)
class Reference:
    """A registered model as somebody wrote it; whether there is one is the registry's to say.

    Attributes:
        text: what was written.
        name: of the model.
        alias, version: what stands behind the name, if anything does; at most one of the two is not None.
    """

    text: str
    name: str
    alias: str | None = None
    version: str | None = None

    @property
    def is_bare(self) -> bool:
        """Whether it is a name alone."""
        return self.alias is None and self.version is None

    @property
    def is_whole(self) -> bool:
        """Whether a registry could have it: nothing is empty, and nothing has a sign that no name can have."""
        which = self.alias if self.version is None else self.version
        return all(_PART.fullmatch(part) for part in (self.name, which) if part is not None)


def parsed(text: str) -> Reference:
    """What a text means where only a registered model can be meant."""
    parts = _PARTS.fullmatch(text.removeprefix(_ADDRESS))
    assert parts is not None
    name, separator, which = parts.groups()
    alias, version = (which, None) if separator == "@" else (None, which)
    return Reference(text, name, alias, version)


def registered(text: str) -> Reference | None:
    """What a text means where a path can be meant, too; None if it is a path.

    The spelling decides: what has a `/`, or begins with `~` or `.`, is a path. A bare name can be either: see
    :attr:`Reference.is_bare`.

    Raises:
        UserError: it is spelled as a registered model, and a file or folder here has that name; or no file can.
    """
    if text.startswith(_ADDRESS):
        return parsed(text)
    # `~name` is somebody's home, and `..` the folder above.
    if "/" in text or "\\" in text or text[:1] in ("", "~", "."):
        return None
    reference = parsed(text)
    if not reference.is_bare and (path := disk.named(text)).exists():
        raise UserError(
            f"{text!r} is a registered model by its spelling, and there is "
            f"{'a folder' if path.is_dir() else 'a file'} of that name here",
            hint=f"write ./{text} for what is here, or {_ADDRESS}{text} for the registered model",
        )
    return reference


def resolve(client: MlflowClient, text: str) -> tuple[ModelVersion, str | None]:
    """The version that a text means now, and the alias by which it was found, if it was.

    Args:
        text: see :func:`parsed`.

    Raises:
        UserError: there is no such model, alias or version; the hint names one that there is.
        MlflowException: the registry does not answer.
    """
    reference = parsed(text)
    model = find_model(client, reference)
    if reference.is_bare:
        return _best(client, model)
    if not (which := reference.alias or reference.version):
        raise UserError(f"{text!r} does not name a version", where=text, hint=f"there is {_known(model)}")
    if reference.alias is not None:
        return _at_alias(client, model, text, which), which
    if not (which.isdecimal() and int(which) < 2**31):
        raise none_such(model, text, "version", which)
    found = _version(client, model.name, str(int(which)))
    if found is None:
        raise none_such(model, text, "version", which)
    return found, None


def find_model(client: MlflowClient, reference: Reference) -> RegisteredModel:
    """The registered model of a reference.

    Raises:
        UserError: there is none of that name; the hint names the nearest.
    """
    name = reference.name
    models = {model.name: model for model in client.search_registered_models(max_results=1000)}
    if name in models:
        return models[name]
    known = nearest(name, models) or ", ".join(sorted(models)[:5])
    raise UserError(
        f"no model {name!r} in the registry",
        where=reference.text,
        hint=f"did you mean {known}?" if known else "nothing is published there yet",
    )


def _best(client: MlflowClient, model: RegisteredModel) -> tuple[ModelVersion, str | None]:
    if CHAMPION in model.aliases:
        return _at_alias(client, model, f"{model.name}@{CHAMPION}", CHAMPION), CHAMPION
    versions = client.search_model_versions(f"name = '{model.name}'")
    finished = [version for version in versions if version.status == "READY"]
    if not finished:
        raise UserError(
            f"{model.name} has no finished version",
            where=model.name,
            hint="publish it again: orchestrator publish FILE",
        )
    return max(finished, key=lambda version: int(version.version)), None


def _at_alias(client: MlflowClient, model: RegisteredModel, reference: str, alias: str) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    number = model.aliases.get(alias)
    if number is not None and _version(client, model.name, str(number)) is None:
        raise UserError(
            f"the version {number} that {reference} points at was deleted",
            where=reference,
            hint="publish it again: orchestrator publish FILE",
        )
    try:
        return client.get_model_version_by_alias(model.name, alias)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise none_such(model, reference, "alias", alias) from error


def _version(client: MlflowClient, name: str, number: str) -> ModelVersion | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def none_such(model: RegisteredModel, where: str, what: str, which: str) -> UserError:
    """That a model has no such alias or version (`what`), and what it has."""
    return UserError(
        f"{model.name} has no {what} {shortened(which, 40)!r}",
        where=where,
        hint=f"there is {_known(model)}",
    )


def _known(model: RegisteredModel) -> str:
    return ", ".join(f"{model.name}@{alias}" for alias in sorted(model.aliases)) or f"{model.name}:1"
