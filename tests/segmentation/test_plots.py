"Plots: whatever comes in is drawn, beats keep their numbers, nothing is left open"
import nbformat, numpy as np, pytest
from matplotlib import pyplot
from nbclient import NotebookClient
from pahcl.segmentation.beats import find_whole_beats, _reject_beats
from pahcl.data.signal import bandpass
from pahcl.data.heart_sounds import simulate_recording
from pahcl.segmentation.plots import _plot_states, _spread_evenly
from pahcl.segmentation.segmenter import segment

@pytest.fixture(scope='module')
def made():
    signal, truth = simulate_recording(23, 2000, 75, seed=3)
    signal[20000:24000] = 0
    states = segment(signal, 2000)
    beats = _reject_beats(find_whole_beats(states), signal, bandpass(signal, 2000), 2000)
    return signal, truth, states, beats.assign(kept=beats.reason == '')

def test_every_beat_is_drawn_once_with_its_number(made, tmp_path):
    signal, truth, states, beats = made
    figure = _plot_states(signal, 2000, states, beats, truth, 'title')
    figure.savefig(tmp_path/'a.png')
    texts = [t.get_text() for ax in figure.axes for t in ax.texts]
    assert (len(figure.axes) == 3 and {int(t) for t in texts if t.isdigit()}
            == set(np.flatnonzero(beats.kept)) and 'flat' in texts)
    assert not pyplot.get_fignums()

@pytest.mark.parametrize('length', [1, 100, 3000, 40000])
def test_any_length(made, tmp_path, length):
    signal = made[0][:length]
    for s in (signal, 0*signal):
        _plot_states(s, 2000, segment(s, 2000)).savefig(tmp_path/'a.png')

def test_spread():
    for count in range(8):
        for wanted in range(10):
            rows = _spread_evenly(count, wanted)
            assert (len(rows) == min(count, wanted) and rows == sorted(set(rows))
                    and all(0 <= r < count for r in rows))

def test_a_notebooks_first_figure_leaves_pyplot_switched_on():
    "The inline backend is loaded with the first figure; what it switches on must outlive that."
    cells = ['from matplotlib import pyplot\nfrom pahcl.segmentation.plots import _plot_states\n'
             'from pahcl.data.heart_sounds import simulate_recording',
             '_plot_states(*simulate_recording(2, 2000, 75)[:1], 2000, '
             'simulate_recording(2, 2000, 75)[1])',
             'figure, ax = pyplot.subplots(figsize=(2, 1))\nax.set(title="shown");']
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('MPLBACKEND', 'module://matplotlib_inline.backend_inline')
        NotebookClient(book, timeout=60, kernel_name='python3').execute()
    assert all('image/png' in c.outputs[0].data for c in book.cells[1:])
