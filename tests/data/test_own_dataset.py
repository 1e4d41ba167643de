"A data set that the package does not know: one registered function, and every stage takes it"
import numpy as np
import pandas as pd
import pytest
import soundfile
from pahcl.core.basics import PahclError
from pahcl.segmentation.preprocessing import preprocess
from pahcl.data.datasets import DATASETS, register_dataset, TASKS
from pahcl.data.fetching import download
from pahcl.data.recordings import load_recordings
from pahcl.data.loader import Cycles
from pahcl.data.heart_sounds import simulate_recording
from pahcl.data.splitting import prepare
from pahcl.data.tasks import Task
from pahcl.testing.made import _make_recordings


@pytest.fixture
def clinic():
    "Wavs called <person>_<quiet or loud>.wav, in one task with a column of its own."
    loudness = dict(column='loudness', label_map=dict(quiet=0, loud=1), primary_metric='auroc')
    @register_dataset('clinic',
                      devices=lambda table: np.where(table['recording_id'] < '5', 'old', 'new'),
                      clinic_loudness=loudness)
    def read_clinic(folder):
        names = {wav: wav.stem.split('_') for wav in sorted(folder.glob('*.wav'))}
        return [dict(subject_id=f'clinic-{who}', person_id=f'clinic-{who}', recording_id=wav.stem,
                     path=wav, folder='rec_chest', loudness=label)
                for wav, (who, label) in names.items()]
    yield
    del DATASETS['clinic'], TASKS['clinic_loudness']


@pytest.fixture
def raw(tmp_path, clinic):
    "Twelve persons, half of them loud."
    (tmp_path/'raw'/'clinic').mkdir(parents=True)
    for i in range(12):
        signal = simulate_recording(5, 2000, seed=i)[0]
        soundfile.write(tmp_path/'raw'/'clinic'/f'{i:02d}_{("quiet", "loud")[i % 2]}.wav',
                        signal, 2000)
    return tmp_path/'raw'


def test_from_raw_files_to_a_task(raw, tmp_path):
    table = load_recordings(raw)
    assert (len(table) == 12 and set(table['dataset']) == {'clinic'}
            and set(table['loudness']) == {'quiet', 'loud'})
    preprocess(raw, tmp_path/'processed', num_workers=1)
    configs = prepare('all', raw, tmp_path/'processed', tmp_path/'downstream')
    assert (list(configs) == ['clinic_loudness']
            and configs['clinic_loudness']['label_map'] == dict(quiet=0, loud=1))
    task = Task.open(tmp_path/'downstream', 'clinic_loudness', 'train')
    assert (task.dataset, task.class_names, task.primary_metric,
            task.official_metric) == ('clinic', ['quiet', 'loud'], 'auroc', None)
    cycles = Cycles.from_task(task.folder, 'train')
    known = table.set_index('recording_id')['loudness'].map(task.label_map)
    assert (cycles.table['label'] == cycles.table['recording_id'].map(known)).all() and len(cycles)
    stats = pd.read_json(tmp_path/'processed'/'processing_stats.json', typ='series')
    assert set(stats['classes']['clinic loudness']) == {'quiet', 'loud'}


def test_made_recordings_and_devices(clinic):
    from pahcl.data.datasets import identify_devices
    made = _make_recordings(['clinic'], persons=4)
    assert made['loudness'].tolist() == ['quiet', 'loud', 'quiet', 'loud']
    assert set(identify_devices(pd.DataFrame(dict(recording_id=['1', '7'])),
                                'clinic')) == {'old', 'new'}


def test_what_cannot_be_fetched_is_told(clinic, tmp_path, capsys):
    assert (download('clinic', tmp_path) == {}
            and f'put it into {tmp_path}/clinic' in capsys.readouterr().out)


def test_a_name_is_given_once(clinic):
    with pytest.raises(PahclError, match='pascal is registered already'):
        register_dataset('pascal')(len)
    with pytest.raises(PahclError, match='circor_murmur is registered already'):
        register_dataset('ward', circor_murmur={})(len)
    assert 'ward' not in DATASETS and TASKS['circor_murmur'].dataset == 'circor'
