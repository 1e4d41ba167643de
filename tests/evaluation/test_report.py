"""pahcl.evaluation.pages, pahcl.core.figures and pahcl.core.figures: curves against scikit-learn
for any scores, pages that fetch nothing, words that are explained, one style everywhere
"""
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from sklearn import metrics as sk

from pahcl.core.figures import _precision_recall_points, roc_figure, _roc_points
from pahcl.core.figures import line_style
from pahcl.core.ranking import _count_at_thresholds
from pahcl.evaluation.pages import _explain_words, _glossary, _render_page

ROOT = Path(__file__).parents[2]
units = st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=2,
                 max_size=40).filter(lambda rows: len({ill for ill, _ in rows}) == 2)


@settings(max_examples=60, deadline=None)
@given(units)
def test_curves_agree_with_scikit_learn_where_scores_are_equal(rows):
    ill, score = (np.array(v) for v in zip(*rows))
    hits, alarms = _count_at_thresholds(ill, score)
    assert [(h, a) for h, a in zip(hits, alarms)] == [(int((ill & (score >= t)).sum()), int(
        (~ill & (score >= t)).sum())) for t in sorted(set(score.tolist()), reverse=True)]
    x, y = _roc_points(ill, score)
    assert np.allclose(((np.diff(x))*(y[1:]+y[:-1])/2).sum(), sk.roc_auc_score(ill, score))
    recall, precision = _precision_recall_points(ill, score)
    assert np.allclose((np.diff(recall)*precision[1:]).sum(),
                       sk.average_precision_score(ill, score))


def test_the_marker_is_where_the_decisions_are():
    truth, said = np.array([0, 0, 0, 1, 1]), np.array([[.9, .1], [.4, .6], [.8, .2], [.3, .7],
                                                       [.6, .4]])
    marker = [line for line in roc_figure(truth, said, ['normal', 'abnormal'],
                                          decided=said.argmax(1)).axes[0].lines
              if line.get_label() == 'abnormal as decided']
    assert [m.get_xydata().tolist() for m in marker] == [[[1/3, 1/2]]]
    assert not [line for line in roc_figure([0, 0], said[:2], ['normal', 'abnormal'],
                                            decided=[0, 1]).axes[0].lines
                if 'decided' in line.get_label()]


def test_lines_differ_in_dash_as_well_as_in_colour():
    dashes, colours = zip(*[(str(line_style(i)['ls']), line_style(i)['color']) for i in range(6)])
    assert len(set(dashes)) == len(set(colours)) == 6


def test_the_chapters_have_the_style_of_the_reports():
    assert (ROOT/'nbs'/'matplotlibrc').read_text() == (
        ROOT/'pahcl'/'parameters'/'figures.mplstyle').read_text()


def test_a_page_fetches_nothing_and_hides_no_text():
    table = pd.DataFrame({'a < b': ['<img src=http://x>']},
                         index=pd.Index(['<script>'], name='score'))
    page = _render_page('"><script>', {
        'A & B': ['text', table, ['<b>'], dict(path='</details><script>')],
        'Figures': [roc_figure([0, 1], [[.9, .1], [.2, .8]], ['</style>', '"onerror='])]})
    tags = re.findall(r'<([a-z0-9]+)[ >]', page)
    assert (not {'script', 'link', 'iframe', 'b'} & set(tags)
            and set(re.findall(r'src="(.{10})', page)) == {'data:image'})
    assert not re.search(r'url\(|@import|https?://[^x]', page) and page.count('</details>') == 1


@pytest.mark.parametrize('word', [w for w in _glossary() if w[0].isalpha()])
def test_every_word_is_found_and_no_part_of_a_word(word):
    told = lambda text: [w.split(':')[0] for w in _explain_words(text)]
    assert word in told(f'{word} 0.5') and word not in told(f'{word}_more of x{word}')
