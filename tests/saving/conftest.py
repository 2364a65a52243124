"""What is saved here is the host that the tests of surgery grow."""

from tests.surgery.conftest import host, new_host, plan_of, slices_of

__all__ = ["host", "new_host", "plan_of", "slices_of"]
