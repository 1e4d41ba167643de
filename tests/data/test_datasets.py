"Who is who in the three data sets, and what a file's name says"
import subprocess
import sys
from datetime import datetime, timedelta

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings, strategies as st
from scipy.sparse.csgraph import connected_components

from pahcl.data.label_files import _link_persons
from pahcl.data.pascal import _group_sittings, _parse_pascal_name


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), max_size=25,
                unique_by=lambda p: p[0]))
@settings(deadline=None)
def test_persons_are_connected_components(pairs):
    "against scipy's connected components; 0 stands for no second id"
    ids, others = [str(a) for a, _ in pairs], [str(b) if b else '' for _, b in pairs]
    graph = scipy.sparse.coo_matrix(
        (np.ones(len(pairs)), ([a for a, _ in pairs], [b or a for a, b in pairs])), (31, 31))
    group = connected_components(graph, directed=False)[1]
    for i, person in _link_persons(ids, others).items():
        assert int(person) == np.flatnonzero(group == group[int(i)]).min()


@pytest.mark.parametrize('name, expected', [
    ('murmur_noisymurmur_162_1307101835989_B_1.wav', ('murmur', '162', '1307101835989', 'B_1')),
    ('__201101220549.wav', ('', '', '201101220549', '')),
    ('set_b/Btraining_murmur_Btraining_noisymurmur_162_1307101835989_B_1.wav',
     ('murmur', '162', '1307101835989', 'B_1')),
    ('Aunlabelledtest__201012172012.wav', ('', '', '201012172012', '')),
    ('extrastole__127_1306764300147_C2.wav', ('extrastole', '127', '1306764300147', 'C2')),
    ('Btraining_extrastole_127_1306764300147_C2.wav', ('extrastole', '127', '1306764300147', 'C2')),
    ('odd.wav', ('', '', 'odd', ''))])
def test_pascal_names(name, expected): assert tuple(_parse_pascal_name(name).values()) == expected


@given(st.lists(st.integers(0, 3000), max_size=30))
@settings(deadline=None)
def test_sittings_are_chains_of_at_most_15_minutes(minutes):
    "the same by cutting the sorted times where more than 15 minutes lie between"
    stamp = lambda m: (datetime(2011, 2, 27, 22)+timedelta(minutes=m)).strftime('%Y%m%d%H%M')
    expected = {}
    for m in sorted(set(minutes)):
        expected[stamp(m)] = stamp(m) if not expected or m-before > 15 else expected[stamp(before)]
        before = m
    assert _group_sittings([stamp(m) for m in minutes]) == expected


def test_the_order_does_not_depend_on_who_is_imported_first():
    program = """
from pahcl.data.registry import register_dataset
register_dataset('clinic', clinic_loud=dict(column='', label_map={}, primary_metric=''))(len)
from pahcl.data import pascal, datasets
print(*datasets.DATASETS, *datasets.TASKS)"""
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True,
                          check=True)
    assert done.stdout.split() == ['circor', 'physionet2016', 'pascal', 'clinic', 'circor_murmur',
                                   'circor_outcome', 'physionet2016', 'pascal', 'clinic_loud']
