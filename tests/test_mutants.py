"""The list of faults fits the code: `make mutants` applies each of them."""

from pathlib import Path

import pytest

from tests.helpers.runs import ROOT
from tests.mutants.faults import FAULTS, PACKAGE, Fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}: {fault.what}")
def test_fault_changes_one_place_and_names_tests(fault: Fault) -> None:
    assert (ROOT / fault.file).read_text(encoding="utf-8").count(fault.old) == 1
    assert fault.new != fault.old
    assert fault.tests and all((ROOT / test).exists() for test in fault.tests)


def test_faults_are_spread_over_all_folders() -> None:
    assert len(FAULTS) >= 40
    folders = {path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py")}
    assert folders <= {Path(fault.file).parent.name for fault in FAULTS}
