"""The commands ``lhopt policy list``, ``inspect`` and ``validate``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from lhopt_fused.actions import Action, ActionSpace
    from lhopt_fused.policy import LearnedPolicy, Policy, RulePolicy

__all__ = ["policy_app"]

policy_app = typer.Typer(no_args_is_help=True, help="Look at policies and check policy files.")
_console = Console(highlight=False)
_errors = Console(highlight=False, stderr=True)

_LONGEST_REASON = 1000  # characters; a broken file may hold names of any length


@policy_app.command("list")
def list_policies() -> None:
    """Show the policies that come with the package."""
    from lhopt_fused.policy import builtin_policies, load_policy

    table = Table.grid(padding=(0, 2))
    for name in builtin_policies():
        table.add_row(f"[bold]{escape(name)}[/]", escape(_description(load_policy(name))))
    _console.print(table)


@policy_app.command()
def inspect(
    policy: Annotated[str, typer.Argument(help="Name of a built-in policy, or a policy file.")],
) -> None:
    """Show what a policy sees, does, starts from, and was trained on."""
    found = _load(policy)
    _console.print(_policy_table(found), "")
    _console.print(_action_table(found.action_space, found.start_hyperparameters))


@policy_app.command()
def validate(
    file: Annotated[Path, typer.Argument(help="A policy file.")],
) -> None:
    """Check a policy file: exit code 0 and one line, or 2 and the reason in one line."""
    found = _load(file)
    _say(_console, f"{file} is a valid policy: {found.name}, {_kind(found)}")


def _load(policy: str | Path) -> Policy:
    """The policy, or the end of the program with the reason why it is none."""
    from lhopt_fused.policy import PolicyFileError, load_policy

    try:
        return load_policy(policy)
    except PolicyFileError as error:
        reason = str(error)
    except FileNotFoundError as error:
        reason = str(error) if isinstance(policy, str) else f"there is no file {policy}"
    except (OSError, ValueError) as error:  # a path with a null byte is a ValueError
        problem = error.strerror if isinstance(error, OSError) else str(error)
        reason = f"{os.fspath(policy)} cannot be read: {problem}"
    _say(_errors, f"Error: {reason}")
    raise typer.Exit(2)


def _say(console: Console, message: str) -> None:
    """Print ``message`` in one line, whatever a file has put into it."""
    line = _printable(message)
    if len(line) > _LONGEST_REASON:
        line = line[:_LONGEST_REASON] + " ..."
    console.print(line, markup=False, soft_wrap=True)


def _printable(text: str) -> str:
    """``text`` with line breaks, control characters and lone surrogates written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# ---------------------------------------------------------------------- the table


def _policy_table(policy: Policy) -> Table:
    from lhopt_fused.policy import LearnedPolicy, RulePolicy

    table = Table.grid(padding=(0, 2))
    rows: dict[str, str | Table] = {"name": policy.name, "kind": _kind(policy)}
    if isinstance(policy, LearnedPolicy):
        rows |= _learned_rows(policy)
    elif isinstance(policy, RulePolicy):
        rows |= _rule_rows(policy)
    registers = "loads, saves and swaps 3" if policy.action_space.registers else "not used"
    rows["restart registers"] = registers
    options = policy.start_options.to_plain()
    rows["inner optimizer"] = ", ".join(f"{name} {value}" for name, value in options.items())
    for name, value in rows.items():
        shown = escape(_printable(value)) if isinstance(value, str) else value
        table.add_row(f"[bold]{name}[/]", shown)
    return table


def _learned_rows(policy: LearnedPolicy) -> dict[str, str | Table]:
    from lhopt_fused.policy import FEATURES, FEATURES_HASH
    from lhopt_fused.policy.features import FEATURES_VERSION
    from lhopt_fused.policy.file import FORMAT_VERSION

    shape = policy.shape
    weights = sum(value.size for value in policy.weights.values())
    trained_on: str | Table = "nothing that it says"
    if policy.trained_on:
        trained_on = _pairs(policy.trained_on)
    return {
        "format version": str(FORMAT_VERSION),
        "features": f"{len(FEATURES)} of version {FEATURES_VERSION} (sha256 {FEATURES_HASH[:12]})",
        "network": f"{shape.features} features, LSTM of width {shape.hidden}, {len(shape.heads)} "
        f"heads of width {shape.head_hidden} with {', '.join(map(str, shape.heads))} choices; "
        f"{weights:,} weights",
        "trained on": trained_on,
        "commit": policy.commit or "unknown",
    }


def _rule_rows(policy: RulePolicy) -> dict[str, str | Table]:
    from lhopt_fused.policy.rules import RULE_FORMAT_VERSION

    schedules = [
        f"{name}: {schedule.shape} to {schedule.final:g} of its start"
        for name, schedule in policy.schedules.items()
    ]
    return {
        "description": policy.description,
        "format version": f"{RULE_FORMAT_VERSION} (of rules)",
        "features": "progress",
        "network": "none",
        "schedules": "; ".join(schedules) or "none",
    }


def _pairs(values: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in values.items():
        table.add_row(escape(_printable(str(name))), escape(_printable(str(value))))
    return table


def _action_table(space: ActionSpace, start: Mapping[str, float]) -> Table:
    """What each hyperparameter starts from and how it may move."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("hyperparameter", "start", "choices of a decision", "bounds"):
        table.add_column(title, no_wrap=title != "choices of a decision")
    for action in space.actions:
        bounds = f"{action.low:g} to {action.high:g}"
        table.add_row(action.name, f"{start[action.name]:g}", _choices(action), bounds)
    return table


def _choices(action: Action) -> str:
    if action.kind == "scale":
        return "times " + ", ".join(f"{choice:.4g}" for choice in action.choices)
    return "logit " + ", ".join(f"{choice:+.4g}" for choice in action.choices)


def _kind(policy: Policy) -> str:
    from lhopt_fused.policy import LearnedPolicy, RulePolicy

    if isinstance(policy, LearnedPolicy):
        uses = ", with restart registers" if policy.action_space.registers else ""
        return f"a learned policy (LSTM of width {policy.shape.hidden}){uses}"
    return "a hand-made rule" if isinstance(policy, RulePolicy) else type(policy).__name__


def _description(policy: Policy) -> str:
    from lhopt_fused.policy import RulePolicy

    return policy.description if isinstance(policy, RulePolicy) else _kind(policy)
