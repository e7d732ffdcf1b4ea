"""Which version of a registered model is meant: `name@alias`, `name:version`, `name/version`, or a bare `name`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from orchestrator.errors import UserError, nearest, shortened

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

CHAMPION = "champion"
"""The alias that a bare name means, and that `publish` sets by default."""

_PARTS = re.compile(r"([^@:/]*)(?:([@:/])(.*))?", re.DOTALL)


def resolve(client: MlflowClient, reference: str) -> tuple[ModelVersion, str | None]:
    """The version that a reference means, and the alias by which it was found, if it was.

    A bare name means its champion if it has one, else its newest finished version.

    Raises:
        UserError: there is no such model, alias or version; the hint names one that there is.
        MlflowException: the registry does not answer.
    """
    parts = _PARTS.fullmatch(reference)
    assert parts is not None
    name, separator, which = parts[1], parts[2], parts[3] or ""
    model = _model(client, reference, name)
    if separator is None:
        return _best(client, model)
    if not which:
        raise UserError(
            f"{reference!r} does not name a version", where=reference, hint=f"there is {_known(model)}"
        )
    if separator == "@":
        return _at_alias(client, model, reference, which), which
    if not (which.isdecimal() and int(which) < 2**31):
        raise _none_such(model, reference, "version", which)
    found = _version(client, name, which)
    if found is None:
        raise _none_such(model, reference, "version", which)
    return found, None


def _model(client: MlflowClient, reference: str, name: str) -> RegisteredModel:
    models = {model.name: model for model in client.search_registered_models(max_results=1000)}
    if name in models:
        return models[name]
    known = nearest(name, models) or ", ".join(sorted(models)[:5])
    raise UserError(
        f"no model {name!r} in the registry",
        where=reference,
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
        raise _none_such(model, reference, "alias", alias) from error


def _version(client: MlflowClient, name: str, number: str) -> ModelVersion | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _none_such(model: RegisteredModel, reference: str, what: str, which: str) -> UserError:
    return UserError(
        f"{model.name} has no {what} {shortened(which, 40)!r}",
        where=reference,
        hint=f"there is {_known(model)}",
    )


def _known(model: RegisteredModel) -> str:
    return ", ".join(f"{model.name}@{alias}" for alias in sorted(model.aliases)) or f"{model.name}:1"
