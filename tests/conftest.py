import re
from pathlib import Path

import pytest
import torch

# Reasons for which tests may be skipped, a regular expression a line; another one is a failure.
ALLOWED_SKIPS = Path(__file__).with_name("allowed_skips.txt")


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    """Tests run side by side: one thread each, and no test depends on another's random state."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def compiler():
    """torch.compile as in a process of its own: what it has cached goes before and after."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class _Skips:
    """Fails a run in which a test was skipped for a reason that is on no committed list."""

    def __init__(self) -> None:
        lines = ALLOWED_SKIPS.read_text(encoding="utf-8").splitlines()
        self.allowed = [line for line in lines if line and not line.startswith("#")]
        self.others: list[str] = []

    def pytest_runtest_logreport(self, report) -> None:
        self._note(report)

    def pytest_collectreport(self, report) -> None:
        self._note(report)

    def _note(self, report) -> None:
        if report.skipped and isinstance(report.longrepr, tuple):
            reason = str(report.longrepr[2]).removeprefix("Skipped: ")
            if not any(re.search(pattern, reason) for pattern in self.allowed):
                self.others.append(f"{report.nodeid}: {reason}")

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if self.others:
            terminalreporter.section(f"skipped for reasons that are not in {ALLOWED_SKIPS.name}")
            for line in self.others:
                terminalreporter.line(line)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session) -> None:
        if self.others and session.exitstatus == 0:
            session.exitstatus = 1


def pytest_configure(config) -> None:
    if not hasattr(config, "workerinput"):  # the workers of pytest-xdist report to this process
        config.pluginmanager.register(_Skips(), "allowed-skips")
