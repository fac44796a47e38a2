"""Chooses which implementation of an op runs, once for all ops.

`implementation=None` tries an op's implementations in their order, best first, and ends at the
reference; a name takes that one or fails; a sequence takes the first that can. An implementation
that cannot serve a call raises `NotImplementedError` with the reason while it is traced.
"""

import logging
from collections.abc import Callable, Mapping, Sequence

_logger = logging.getLogger("pallas_kernels")
_reported: set[tuple[str, str, tuple[str, ...]]] = set()

type Implementation = str | Sequence[str] | None


def dispatch[**P, R](
    op: str, implementations: Mapping[str, Callable[P, R]], implementation: Implementation
) -> Callable[P, R]:
    """Returns a callable that runs `op` with the requested or best implementation.

    Args:
      op: the op's name, for messages.
      implementations: name to function, best first, the universal fallback last.
      implementation: None, a name, or names in order of preference.

    Raises:
      ValueError: a name that the op does not have.
      NotImplementedError: from the call, if the single named implementation cannot serve it.
      ExceptionGroup: from the call, if all of several cannot, with every reason.
    """
    if implementation is None:
        names = tuple(implementations)
    elif isinstance(implementation, str):
        names = (implementation,)
    else:
        names = tuple(implementation)
    unknown = [name for name in names if name not in implementations]
    if unknown or not names:
        known = ", ".join(implementations)
        raise ValueError(f"{op} has no implementation {unknown or '()'}; choose from {known}")

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        refusals: list[NotImplementedError] = []
        for name in names:
            try:
                result = implementations[name](*args, **kwargs)
            except NotImplementedError as refusal:
                if len(names) == 1:
                    raise
                refusal.add_note(f"{op}: implementation {name!r}")
                refusals.append(refusal)
                continue
            if implementation is None:
                _report(op, name, refusals)
            return result
        raise ExceptionGroup(f"no implementation of {op} can serve this call", refusals)

    return run


def _report(op: str, chosen: str, refusals: Sequence[NotImplementedError]) -> None:
    """Logs, once per op and set of reasons, what a default call runs as."""
    reasons = tuple(str(refusal) for refusal in refusals)
    if (op, chosen, reasons) not in _reported:
        _reported.add((op, chosen, reasons))
        _logger.info("%s runs as %r%s", op, chosen, "".join(f"; {r}" for r in reasons))
