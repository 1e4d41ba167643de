"The packaged recordings: credited, small, annotated where they say, and read by what reads a file"
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from pahcl.core.basics import PahclError
from pahcl.data.datasets import DATASETS
from pahcl.data.examples import _FOLDER, list_examples, load_example
from pahcl.segmentation.scoring import score_states
from pahcl.segmentation.segmenter import segment

RAW = os.environ.get('PAHCL_RAW_DIR')
NAMES = list(list_examples().index)


def test_the_folder_holds_what_the_table_says_and_is_small():
    found = {p.name for p in _FOLDER.iterdir() if not p.name.startswith('__')}
    assert found == {'README.md', 'examples.csv',
                     *(f'{n}.{e}' for n in NAMES for e in ('flac', 'tsv'))}
    assert sum(p.stat().st_size for p in _FOLDER.iterdir()) < 2*2**20


@pytest.mark.parametrize('name', NAMES)
def test_an_example_is_what_its_row_says(name):
    heard, row = load_example(name), list_examples().loc[name]
    seconds = len(heard.signal)/heard.sample_rate
    assert seconds == pytest.approx(row.end_s-row.start_s, abs=1e-3)
    states = heard.states
    assert set(states.state) <= {1, 2, 3, 4} and (states.end_s > states.start_s).all()
    assert (states.start_s.iloc[1:].values >= states.end_s.iloc[:-1].values-1e-6).all()
    assert states.start_s.min() >= 0 and states.end_s.max() <= seconds+1e-6
    onsets = states.start_s[states.state == 1]
    assert 60/onsets.diff().median() == pytest.approx(row.heart_rate, rel=.02)
    source = DATASETS[row.dataset].source
    assert row.licence == source.licence and row.citation in source.credit
    assert row.recording_id in heard.credit and row.citation in heard.credit


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(PahclError, match=f'(?s)gallop.*{NAMES[0]}.*{NAMES[-1]}'):
        load_example('gallop')


def test_what_is_listed_can_be_changed_without_harm():
    table = list_examples()
    table['title'] = ''
    assert list_examples().title.ne('').all()


def test_a_page_shows_player_and_credit_and_quotes_what_is_text():
    from dataclasses import replace
    page = replace(load_example('normal'), title='<b>', credit='A & B')._repr_html_()
    assert 'src="data:audio/wav;base64,' in page and '&lt;b&gt;' in page and 'A &amp; B' in page


def test_the_segmenter_finds_the_annotated_beats():
    "not a measure of it, as it was fitted on these persons: of the clips, their rate, their states"
    heard = load_example('normal')
    found = segment(heard.signal, heard.sample_rate)
    assert score_states(found, heard.states)['pooled']['f1'] > .9


@pytest.mark.skipif(not RAW, reason='PAHCL_RAW_DIR names no real data')
def test_the_samples_are_the_publishers():
    compared = 0
    for name, row in list_examples().iterrows():
        for path in Path(RAW, row.dataset).glob(f'*/{row.recording_id}.wav'):
            sound, rate = soundfile.read(path, dtype='int16')
            ours, our_rate = soundfile.read(load_example(name).path, dtype='int16')
            assert rate == our_rate
            start = round(row.start_s*rate)
            np.testing.assert_array_equal(ours, sound[start:start+len(ours)])
            compared += 1
    if not compared: pytest.skip('none of them in this slice')


def test_persons_are_named_as_everywhere():
    table = list_examples()
    same = table.loc[['systolic_loud', 'systolic_soft']]
    assert same.person_id.nunique() == 1 and same.location.nunique() == 2
    assert isinstance(table, pd.DataFrame) and table.person_id.nunique() == len(table)-1
