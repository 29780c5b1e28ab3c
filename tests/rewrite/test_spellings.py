"""The table of spellings: its rows name rules that there are, and no rule is named by none."""

import inspect

import pytest
import torch

from cce_inductor.graph.facts import Fact
from cce_inductor.graph.spellings import FUNCTIONS, METHODS, NAMES, SPELLINGS
from cce_inductor.trace import rules

TABLES = {"head": rules.HEADS, "several": rules.SEVERAL, "beside": rules.BESIDE, "rules": rules.RULES}


def test_each_function_and_method_stands_once():
    assert len(FUNCTIONS) == sum(len(set(row.functions)) for row in SPELLINGS)
    assert len(METHODS) == sum(len(set(row.methods)) for row in SPELLINGS)
    assert all(hasattr(torch.Tensor, name) or hasattr(torch.Tensor, f"{name}_") for name in METHODS)


@pytest.mark.parametrize("column", TABLES)
def test_every_rule_of_the_table_is_there(column):
    named = {name for name, row in NAMES.items() if getattr(row, column)}
    assert named == set(TABLES[column]) and named


def test_a_name_that_stands_twice_has_its_facts_in_the_first_row():
    seen = set()
    for row in SPELLINGS:
        if row.name in seen:
            assert not (row.facts or row.rules or row.head or row.beside or row.several), row.name
        seen.add(row.name)


@pytest.mark.parametrize("module", rules.MODULES.values(), ids=list(rules.MODULES))
def test_every_rule_is_in_the_table(module):
    """A public function that takes what a rule takes, and that no row names, would be one that nobody finds."""
    own = module.__name__.rpartition(".")[2]
    named = {where for row in NAMES.values() for where in (*row.rules, row.head, row.beside, row.several)}
    for name, made in inspect.getmembers(module, inspect.isfunction):
        takes = list(inspect.signature(made).parameters)
        is_rule = takes in (["value", "node", "args"], ["node", "args"], ["walk", "node", "op", "touched"])
        if made.__module__ == module.__name__ and is_rule and not name.startswith("_"):
            assert f"{own}.{name}" in named


def test_facts_of_rows_agree():
    for name, row in NAMES.items():
        views = bool(row.facts & Fact.VIEW)
        assert not views or row.facts & Fact.HANDS_ON, f"{name} is a view, and so hands on entries"
        assert not (row.facts & Fact.REPEATS and row.facts & Fact.EACH_ONCE), name
