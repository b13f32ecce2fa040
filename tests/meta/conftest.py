"""One thread, as for the policies."""

from policy.conftest import one_thread

__all__ = ["one_thread"]
