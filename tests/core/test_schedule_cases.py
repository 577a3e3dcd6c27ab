import runpy
from pathlib import Path

CASES = Path(__file__).parents[1] / "js" / "schedule_cases.json"


def test_the_cases_of_the_javascript_tests_are_what_python_says():
    made = runpy.run_path(str(CASES.with_name("make_cases.py")))["make"]()
    assert CASES.read_text() == made, "run tests/js/make_cases.py from the repository root"
