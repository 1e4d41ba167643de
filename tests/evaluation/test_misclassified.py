"""The report shows whoever was decided wrongly, worst first, with the sound that was judged"""
import base64, io, re
import numpy as np, pytest, soundfile
from pahcl.core.predictions import Predictions
from pahcl.data.splitting import prepare
from pahcl.data.tasks import Task
from pahcl.data.loader import Cycles
from pahcl.evaluation.decisions import Decisions
from pahcl.evaluation.misclassified import (
    _choose_stretch, _describe_misclassified, _list_misclassified, _SECONDS, _SHOWN, _time_beats)
from pahcl.testing.made import _make_processed_folder, _make_recordings


@pytest.fixture(scope='module')
def judged(tmp_path_factory):
    "A made task, and a model that says of every cycle what the file's number says."
    root = tmp_path_factory.mktemp('judged')
    _make_processed_folder(root/'processed', _make_recordings(('physionet2016',), persons=24),
                           cycles=9, signals=True)
    prepare('physionet2016', root/'none', root/'processed', root/'downstream')
    task = Task.open(root/'downstream', 'physionet2016', 'train')
    table = Cycles.from_task(task.folder, 'train').table
    p = np.random.default_rng(1).uniform(.05, .95, len(table))
    predictions = Predictions(table, np.stack([1-p, p], 1), task.label_map)
    return Decisions.of(predictions, task.name), task


def test_worst_first_and_nobody_who_was_right(judged):
    decisions, task = judged
    wrong, subjects = _list_misclassified(decisions), decisions.levels['subject']
    assert set(wrong['subject_id']) == set(subjects.table.query('label != predicted')['subject_id'])
    assert wrong['p_truth'].is_monotonic_increasing and (wrong['p_truth'] < .5).all()


def test_the_sound_is_the_stretch_that_spoke_against_the_truth(judged):
    decisions, task = judged
    page = ''.join(map(str, _describe_misclassified(decisions, task)))
    sounds = re.findall('src="data:audio/wav;base64,([^"]*)', page)
    wrong = _list_misclassified(decisions)
    assert len(sounds) == min(_SHOWN, len(wrong)) == page.count('<img ') > 0
    row = wrong.iloc[0]
    own = decisions.levels['recording'].table.query('subject_id == @row.subject_id')
    recording = own['recording_id'].iloc[0]
    beats = _time_beats(decisions, task, recording, row['truth'], row['decided'])
    assert np.allclose(beats['p_truth']+beats['p_decided'], 1) and len(beats) == 9
    numbers = np.load(task.folder/beats['file_path'][0].rpartition('/')[0]/'signal.npy')
    at = round(_choose_stretch(beats, len(numbers)/4000)*4000)
    heard = soundfile.read(io.BytesIO(base64.b64decode(sounds[0])))[0]
    kept = numbers[at:at+round(4000*_SECONDS)].astype(float)
    assert len(heard) == len(kept) and np.corrcoef(heard, kept)[0, 1] > .9999


def test_a_lost_sound_is_said(judged, tmp_path):
    decisions, task = judged
    gone = Task(tmp_path, task.config)
    object.__setattr__(gone, 'read_cycles', task.read_cycles)
    page = ''.join(map(str, _describe_misclassified(decisions, gone)))
    assert '<audio' not in page and 'keeps no sound of it' in page
