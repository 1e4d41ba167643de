"""pahcl.studies.ablation on simulated recordings: it trains what the file says, goes on where it
stopped, and has no number for what was not trained
"""
import json
import shutil

import pandas as pd
import pytest
import yaml
from hypothesis import given, strategies as st

from pahcl.evaluate import pahcl_ablation
from pahcl.studies.ablation_plan import _read_ablation, _training_jobs
from pahcl.core.basics import PahclError
from pahcl.studies.ablation_table import _holm_correction

SMALL = dict(config='small_pretrain',
             training=dict(num_epochs=1, warmup_epochs=0, cycles_per_recording=1),
             contrast=dict(cycle_projector=[16, 8], substructure_projector=[16, 8]),
             model=dict(cnn_channels=[4, 4, 4, 4], mamba_d_model=8, mamba_n_layers=1))
TUNE = dict(config='small_finetune',
            training=dict(num_epochs=1, warmup_epochs=0, cycles_per_recording=1))


pytestmark = pytest.mark.usefixtures('quick_starts', 'no_figures')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    from pahcl.segmentation.preprocessing import preprocess
    from pahcl.data.simulation import simulate_dataset
    from pahcl.data.splitting import prepare
    work = tmp_path_factory.mktemp('ablation')
    simulate_dataset(work/'raw', 'pascal', subjects=12, seed=0, seconds=4)
    preprocess(work/'raw', work/'processed', num_workers=1)
    prepare('all', work/'raw', work/'processed', work/'downstream')
    return work


def written(data, tmp_path, variants, **keys):
    content = dict(tasks=['pascal'], seeds=[1], raw_dir=str(data/'raw'),
                   processed_dir=str(data/'processed'), data_dir=str(data/'downstream'),
                   pretrain=SMALL, finetune=TUNE, variants=variants) | keys
    (tmp_path/'ablation.yaml').write_text(yaml.safe_dump(content, sort_keys=False))
    return ['--config', str(tmp_path/'ablation.yaml'), '--output-dir', str(tmp_path/'outputs')]


def test_end_to_end(data, tmp_path, capsys):
    flags = written(data, tmp_path,
                    dict(cycle_only=dict(pretrain=dict(contrast=dict(lambda_substructure=0.))),
                         scratch=dict(pretrained='none')))
    assert pahcl_ablation([*flags, '--dry-run']) == 0 and not (tmp_path/'outputs').exists()
    assert capsys.readouterr().out.count('to do') == 3
    assert pahcl_ablation([*flags, '--jobs', '2']) == 0
    folder = tmp_path/'outputs'/'ablation'
    table = pd.read_csv(folder/'ablation.csv')
    assert (set(table['variant']) == {'cycle_only', 'scratch'} and (table['seeds'] == 1).all()
            and table['missing'].isna().all())
    for variant in ('cycle_only', 'scratch'):   # the table says what the run itself says
        final = json.loads((folder/f'pascal_{variant}_seed1'/'final_metrics.json').read_text())
        own = table[table['variant'] == variant].set_index('score')['mean']
        assert (own['accuracy'] == pytest.approx(final['test_accuracy'])
                and (own['auroc'] == pytest.approx(final['test_auroc'], abs=1e-6)
                     or final['test_auroc'] is None))
    assert yaml.safe_load((folder/'pretrain_cycle_only_seed1'/'config.yaml').read_text())[
        'contrast']['lambda_substructure'] == 0
    assert yaml.safe_load((folder/'pascal_scratch_seed1'/'config.yaml').read_text())['model'][
        'cnn_channels'] == [4, 4, 4, 4]
    assert {p.name for p in folder.glob('ablation.*')} == {
        'ablation.csv', 'ablation.md', 'ablation.tex', 'ablation.html', 'ablation.png'}
    # one fine-tuning is lost: only that one is trained again
    stamps = {p: p.stat().st_mtime_ns for p in folder.glob('*/best_model.pt')}
    shutil.rmtree(folder/'pascal_scratch_seed1')
    assert pahcl_ablation(flags) == 0
    assert [p.parent.name for p, t in stamps.items()
            if p.stat().st_mtime_ns != t] == ['pascal_scratch_seed1']
    assert pd.read_csv(folder/'ablation.csv').equals(table)


def test_what_was_not_trained_has_no_number(data, tmp_path, capsys):
    flags = written(data, tmp_path, dict(scratch=dict(pretrained='none'),
                                         lost=dict(pretrained=str(tmp_path/'no.pt'))), seeds=[1])
    assert pahcl_ablation(flags) == 1
    said = capsys.readouterr()
    assert 'pascal_lost_seed1' in said.err and 'no.pt' in said.err
    table = pd.read_csv(tmp_path/'outputs'/'ablation'/'ablation.csv').set_index('variant')
    assert (table.loc['lost', 'mean'].isna().all()
            and (table.loc['lost', 'missing'] == 'seed 1 not trained').all()
            and table.loc['scratch', 'mean'].notna().any())
    assert '| lost |' in (tmp_path/'outputs'/'ablation'/'ablation.md').read_text()


def test_another_length_mode_is_cut_and_split_alike(data, tmp_path):
    flags = written(data, tmp_path, dict(pad=dict(pretrained='none'),
                                         phase=dict(pretrained='none', length_mode='phase')))
    assert pahcl_ablation(flags) == 0
    config = json.loads((tmp_path/'outputs'/'ablation'/'data_phase'/'downstream'/'pascal'
                         /'task_config.json').read_text())
    assert config['length_mode'] == 'phase' and config['split_subjects'] == json.loads(
        (data/'downstream'/'pascal'/'task_config.json').read_text())['split_subjects']
    assert pd.read_csv(tmp_path/'outputs'/'ablation'/'ablation.csv')['difference'].notna().any()


@pytest.mark.parametrize('name', ['ablation', 'small_ablation'])
def test_packaged_file_is_valid(name, tmp_path, capsys):
    a = _read_ablation(name, seeds=[42])
    jobs = _training_jobs(a, tmp_path)
    assert {p.variant for p in jobs if p.kind == 'finetune'} == set(a.variants) and len(
        [p for p in jobs if p.kind == 'finetune']) == len(a.variants)*len(a.tasks)*len(a.seeds)
    configs = [json.dumps({k: v for k, v in p.config.items() if k != 'experiment'}, sort_keys=True)
               for p in jobs if p.kind == 'pretrain' and p.seed == 42]
    assert len(set(configs)) == len(configs)   # no variant is another one under a second name
    assert (pahcl_ablation(['--config', name, '--seeds', '42', '--output-dir', str(tmp_path),
                            '--dry-run']) == 0 and capsys.readouterr().out.count('to do')
            == len(jobs) and not list(tmp_path.iterdir()))


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1, max_size=20))
def test_holm_is_the_stepwise_procedure(p):
    """As Holm wrote it down: reject the smallest while it is below level / number of those left; a
    hypothesis is rejected at just those levels that are not under its corrected p-value.
    """
    corrected = _holm_correction(p)
    known = sorted((v, i) for i, v in enumerate(p) if v is not None)
    for level in (.01, .05, .2):
        rejected, left = set(), len(known)
        for v, i in known:
            if v > level/left: break
            rejected.add(i)
            left -= 1
        close = {i for _, i in known if corrected[i] == pytest.approx(level, rel=1e-9)}
        assert {i for _, i in known if corrected[i] <= level} | close == rejected | close
    assert all(c != c for v, c in zip(p, corrected) if v is None)


@pytest.mark.parametrize('wrong, said', [
    (dict(variants={}), 'variants is empty'), (dict(variants={'a b': {}}), "'a b' is no name"),
    (dict(seeds=[1, 1]), 'each once'),
    (dict(variants=dict(full=dict(lenght_mode='phase'))), "nearest valid one is 'length_mode'"),
    (dict(variants=dict(full=dict(pretrain=dict(contrast=dict(temperature=-1))))), 'temperature')])
def test_mistakes_are_found_before_anything_is_trained(wrong, said):
    with pytest.raises(PahclError, match=said):
        _training_jobs(_read_ablation(dict(variants=dict(full={})) | wrong))
