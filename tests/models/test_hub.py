"Folders of the Hub: whole or not at all, back to the bit, known by every command; cards are true"
import json
import re
from pathlib import Path
import pytest, torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
import pahcl
import pahcl.models.hub_folders as hub_folders
from pahcl.core.basics import fingerprint, PahclError
from pahcl.evaluation.evaluator import evaluate
from pahcl.models.checkpoints import (
    classifier_checkpoint, load_checkpoint, load_classifier, persons_trained_on, save_checkpoint)
from pahcl.models.classifier import Classifier
from pahcl.models.encoder_base import Encoder
from pahcl.models.encoders import build_encoder
from pahcl.models.hub import from_pretrained
from pahcl.models.pretrained import load_pretrained_encoder
from pahcl.studies.downstream import _hash_checkpoint
from pahcl.training.finetuning import finetune
from pahcl.training.finetuning_setup import _pretrained_fingerprint

pytestmark = pytest.mark.usefixtures('one_thread', 'quiet')

TINY = dict(encoder_type='cnn', cnn_channels=[4, 8], cnn_kernel_sizes=[7, 5], cnn_strides=[8, 8],
            mamba_d_model=8)
MAP = dict(normal=0, murmur=1, extrasystole=2)
CYCLES, VALID = torch.randn(3, 1, 800), torch.tensor([800, 500, 120])
VALIDATION = {level: dict(label=torch.arange(3), person=torch.tensor([4, 5, 6]),
                          probabilities=torch.rand(3, 3))
              for level in ('recording', 'subject')}

def tiny(classes=3, seed=0, **head):
    torch.manual_seed(seed)
    return Classifier(build_encoder(TINY), classes, **head).eval()

def checkpoint(path, model=None, **more):
    content = classifier_checkpoint(model or tiny(), 'pascal', MAP, {}, ['pascal-b1', '2530'])
    save_checkpoint(path, content | dict(epoch=4) | more)
    return path

def files(folder): return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}

def same(one, other): return torch.equal(one(CYCLES, VALID), other(CYCLES, VALID))

def flat(value, place=''):
    "Nested dictionaries as one, tensors as lists."
    if isinstance(value, torch.Tensor): return {place: value.tolist()}
    if not isinstance(value, dict): return {place: value}
    inside = [flat(v, f'{place}/{key}') for key, v in value.items()]
    return {k: v for part in inside for k, v in part.items()}


# ---- there and back --------------------------------------------------------------------------

@pytest.mark.parametrize('head', [{}, dict(hidden_dim=0, standardise=True),
                                  dict(aggregation='attention', bag_level='recording')])
def test_a_folder_holds_what_the_checkpoint_holds(tmp_path, head):
    model = tiny(**head)
    path = checkpoint(tmp_path/'best_model.pt', model, validation=VALIDATION)
    loaded, saved = load_classifier(path)
    loaded.save_pretrained(tmp_path/'a'/'b')
    again, facts = load_classifier(tmp_path/'a'/'b')
    assert same(again, model) and not again.training and flat(facts) == flat(saved)
    assert persons_trained_on(facts) == {'pascal-b1', '2530'} and facts['epoch'] == 4
    again.save_pretrained(tmp_path/'c')   # and from there
    assert files(tmp_path/'c') == files(tmp_path/'a'/'b')
    assert set(files(tmp_path/'c')) == {'config.json', 'model.safetensors', 'arrays.safetensors',
                                        'README.md'}
    assert load_file(tmp_path/'c'/'model.safetensors').keys() == model.state_dict().keys()
    assert 'tensor' not in (tmp_path/'c'/'config.json').read_text()

def test_the_encoder_of_a_classifier(tmp_path):
    model, _ = load_classifier(checkpoint(tmp_path/'best_model.pt'))
    model.save_pretrained(tmp_path/'whole')
    model.encoder.save_pretrained(tmp_path/'encoder')
    for folder in ('whole', 'encoder'):
        for e in (Encoder.from_pretrained(tmp_path/folder), from_pretrained(tmp_path/folder, 0),
                  load_pretrained_encoder(tmp_path/folder).encoder.eval()):
            assert isinstance(e, Encoder) and same(e, model.encoder)
    config = json.loads((tmp_path/'encoder'/'config.json').read_text())
    known = config.pop('trained')
    assert config == model.encoder.config and known['pretrain_persons'] == ['2530', 'pascal-b1']
    assert known['chosen_by'] == 'labels of pascal'
    saved = load_checkpoint(tmp_path/'encoder')
    assert saved['kind'] == 'pretrain' and persons_trained_on(saved) == {'pascal-b1', '2530'}
    with pytest.raises(PahclError, match='of kind pretrain, but finetune is needed'):
        load_classifier(tmp_path/'encoder')
    with pytest.raises(PahclError, match='without a head: give num_classes'):
        Classifier.from_pretrained(tmp_path/'encoder')
    assert from_pretrained(tmp_path/'encoder', 5)(CYCLES, VALID).shape == (3, 5)

def test_a_folder_of_an_older_version(tmp_path):
    "Flat settings and weights, no card, nothing known of persons."
    e = tiny().encoder
    (tmp_path/'config.json').write_text(json.dumps(e.config))
    save_file(e.state_dict(), tmp_path/'model.safetensors', metadata={'format': 'pt'})
    assert same(from_pretrained(tmp_path), e) and same(Encoder.from_pretrained(tmp_path), e)
    encoder, saved, _ = load_pretrained_encoder(tmp_path)
    assert same(encoder.eval(), e) and persons_trained_on(saved) is None

def test_num_classes_and_heads(tmp_path):
    model, _ = load_classifier(checkpoint(tmp_path/'best_model.pt'))
    model.save_pretrained(tmp_path/'m')
    for source in (tmp_path/'m', tmp_path/'best_model.pt'):
        assert same(from_pretrained(source), model) and same(from_pretrained(source, 3), model)
        torch.manual_seed(1)
        other = from_pretrained(source, 2, hidden_dim=0)
        assert other(CYCLES, VALID).shape == (3, 2) and other.head_settings['hidden_dim'] == 0
        assert same(other.encoder, model.encoder) and 'task' not in other.origin.facts
        assert not same(from_pretrained(source, 3, dropout=0.1), model)
    assert pahcl.from_pretrained is from_pretrained
    before = {k: v.clone() for k, v in model.encoder.state_dict().items()}
    assert model.train().reset_head(2, aggregation='attention') is model and model.training
    assert model.bag_levels == ['recording', 'subject'] and model.attention.training
    assert model(CYCLES, VALID, torch.tensor([0, 0, 1])).shape == (2, 2)
    assert all(torch.equal(v, before[k]) for k, v in model.encoder.state_dict().items())
    model.reset_head(4, aggregation='cycle')
    assert model.attention is None and 'attention' not in ' '.join(model.state_dict())
    model.save_pretrained(tmp_path/'m')
    assert same(from_pretrained(tmp_path/'m'), model.eval())
    facts = load_checkpoint(tmp_path/'m')
    assert 'task' not in facts and 'label_map' not in facts and facts['kind'] == 'classifier'
    assert persons_trained_on(facts) == {'pascal-b1', '2530'}   # the encoder has met them

def test_weights_that_were_changed_leave_scores_behind(tmp_path, logged):
    pahcl.core.basics.get_logger().setLevel('INFO')
    model, _ = load_classifier(checkpoint(tmp_path/'best_model.pt', validation=VALIDATION))
    write_scores(tmp_path)
    assert 'Results' in model.generate_model_card().text
    with torch.no_grad(): next(model.parameters()).add_(1e-3)
    model.save_pretrained(tmp_path/'m')
    saved = load_checkpoint(tmp_path/'m')
    assert any('no longer those of' in line for line in logged)
    assert 'validation' not in saved and 'evaluations' not in saved and saved['task'] == 'pascal'
    assert persons_trained_on(saved) == {'pascal-b1', '2530'}
    assert not ModelCard.load(tmp_path/'m'/'README.md').data.eval_results


# ---- whole or not at all ---------------------------------------------------------------------

@pytest.mark.parametrize('place', ['save_file', 'write_json', 'write_text'])
@pytest.mark.parametrize('there', [True, False])
def test_a_full_disk_leaves_the_old_files(tmp_path, monkeypatch, place, there):
    folder = tmp_path/'m'
    if there:
        tiny(seed=1).save_pretrained(folder)
        (folder/'notes.txt').write_text('of a user')
    before = files(folder) if there else None
    def full(path, *args, **kwargs): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(hub_folders, place, full)
    with pytest.raises(PahclError, match='m could not be written .No space left on device.; what '
                                         'was there before is intact'):
        tiny(seed=2).save_pretrained(folder)
    assert (files(folder) == before) if there else not folder.exists()
    assert [p.name for p in tmp_path.iterdir()] == (['m'] if there else [])
    monkeypatch.undo()
    tiny(seed=2).save_pretrained(folder)
    assert same(from_pretrained(folder), tiny(seed=2))
    assert (folder/'notes.txt').exists() == there

def test_arrays_of_an_older_saving_go(tmp_path):
    load_classifier(checkpoint(tmp_path/'a.pt', validation=VALIDATION))[0].save_pretrained(
        tmp_path/'m')
    tiny(seed=3).save_pretrained(tmp_path/'m')
    assert set(files(tmp_path/'m')) == {'config.json', 'model.safetensors', 'README.md'}

@pytest.mark.parametrize('name, text, message', [
    ('config.json', '{"head": {}}', 'has no encoder_type'),
    ('model.safetensors', 'rubbish', 'not a readable safetensors file'),
    ('arrays.safetensors', 'rubbish', 'arrays.safetensors is not a readable safetensors file')])
def test_broken_classifiers_are_named(tmp_path, name, text, message):
    load_classifier(checkpoint(tmp_path/'a.pt', validation=VALIDATION))[0].save_pretrained(
        tmp_path/'m')
    (tmp_path/'m'/name).write_text(text)
    for load in (from_pretrained, Classifier.from_pretrained, load_classifier):
        with pytest.raises(PahclError, match=message): load(tmp_path/'m')

def test_a_misfit_names_the_weights(tmp_path):
    tiny().save_pretrained(tmp_path/'m')
    config = json.loads((tmp_path/'m'/'config.json').read_text())
    config['head']['hidden_dim'] = 7
    (tmp_path/'m'/'config.json').write_text(json.dumps(config))
    with pytest.raises(PahclError, match='model.safetensors does not fit .*misshapen: classifier'):
        from_pretrained(tmp_path/'m')

def test_a_model_without_a_task_is_told_one(tmp_path):
    tiny().save_pretrained(tmp_path/'m')
    with pytest.raises(PahclError, match='of kind classifier, but finetune is needed'):
        load_classifier(tmp_path/'m')
    tiny().save_pretrained(tmp_path/'m', config=dict(task='clinic', label_map=MAP,
                                                     training_persons=['X1']))
    assert load_classifier(tmp_path/'m')[1]['task'] == 'clinic'
    card = ModelCard.load(tmp_path/'m'/'README.md')
    assert '1 person;' in card.text and 'license' not in card.data.to_dict()


# ---- the Hub: its HTTP is replaced, no network here ------------------------------------------

def test_push_and_pull(tmp_path, monkeypatch):
    hub = {}
    class Repo: repo_id = 'owner/hearts'
    def create_repo(self, repo_id, **settings): hub['asked'] = repo_id, settings; return Repo
    def upload_folder(self, *, repo_id, folder_path, **settings):
        hub[repo_id] = files(folder_path)
        return f'https://huggingface.co/{repo_id}/commit/1'
    monkeypatch.setattr(HfApi, 'create_repo', create_repo)
    monkeypatch.setattr(HfApi, 'upload_folder', upload_folder)
    model, _ = load_classifier(checkpoint(tmp_path/'best_model.pt', validation=VALIDATION))
    assert model.push_to_hub('owner/hearts', private=True).endswith('owner/hearts/commit/1')
    assert hub['asked'][0] == 'owner/hearts' and hub['asked'][1]['private'] is True
    model.save_pretrained(tmp_path/'m')
    assert hub['owner/hearts'] == files(tmp_path/'m')   # what is published is what is saved
    assert 'owner/hearts' in model.save_pretrained(tmp_path/'n', push_to_hub=True,
                                                   repo_id='owner/hearts')
    asked = []
    monkeypatch.setattr(hub_folders, 'snapshot_download', lambda name, **how:
                        asked.append((name, how)) or str(tmp_path/'m'))
    monkeypatch.chdir(tmp_path)
    again = from_pretrained('owner/hearts', download=dict(revision='v1', token='t'))
    assert same(again, model) and asked[0][0] == 'owner/hearts'
    assert asked[0][1] == dict(allow_patterns=['config.json', '*.safetensors'], revision='v1',
                               token='t')
    assert Classifier.from_pretrained('owner/hearts', 2)(CYCLES, VALID).shape == (3, 2)
    assert same(Encoder.from_pretrained('owner/hearts'), model.encoder)


# ---- cards -----------------------------------------------------------------------------------

def write_scores(folder, checkpoint='best_model.pt', name='evaluation_pascal_test', **more):
    scores = dict(auroc=0.8125, f1_macro=0.625, discriminant_power=None, n=9, support=[3, 3, 3],
                  intervals=dict(auroc=[0.5, 0.9375], f1_macro=[None, None]))
    results = dict(task='pascal', split='test', n=dict(subject=9), threshold='youden',
                   thresholds=dict(subject=0.375), checkpoint=f'x/{checkpoint}',
                   levels=dict(subject=scores))
    (folder/name).mkdir(exist_ok=True)
    (folder/name/'metrics.json').write_text(json.dumps(results | more))

def card_of(path): return load_classifier(path)[0].generate_model_card()

def numbers(card): return {r.metric_type: r.metric_value for r in card.data.eval_results or []}

def test_scores_of_other_weights_are_not_in_the_card(tmp_path):
    checkpoint(tmp_path/'best_model.pt'), checkpoint(tmp_path/'final_model.pt', tiny(seed=5))
    write_scores(tmp_path)
    card = card_of(tmp_path/'best_model.pt')
    assert numbers(card) == dict(auroc=0.8125, f1_macro=0.625)
    assert '| auroc | 0.8125 | 0.5000 to 0.9375 |' in card.text and 'youden (0.3750)' in card.text
    assert '| f1_macro | 0.6250 |  |' in card.text
    assert not numbers(card_of(tmp_path/'final_model.pt'))
    checkpoint(tmp_path/'best_model.pt', tiny(seed=6))   # trained anew after the evaluation
    assert not numbers(card_of(tmp_path/'best_model.pt'))

def test_what_is_not_known_is_left_out(tmp_path):
    card = tiny().generate_model_card()
    data = card.data.to_dict()
    assert {'license', 'datasets', 'model-index'}.isdisjoint(data)
    assert data['library_name'] == 'pahcl' and data['pipeline_tag'] == 'audio-classification'
    assert 'not recorded whom' in card.text and 'not for diagnosis' in card.text
    assert tiny().encoder.generate_model_card().data.pipeline_tag == 'feature-extraction'

@pytest.mark.parametrize('persons, licence', [
    (['2530'], 'odc-by'), (['2530', '2016-a-C11'], 'odc-by'), (['pascal-b1', '2530'], 'other'),
    (['X1', '2530'], None)])
def test_the_licence_is_that_of_the_data(tmp_path, persons, licence):
    content = classifier_checkpoint(tiny(2), 'circor_outcome', dict(Normal=0, Abnormal=1), {},
                                    persons)
    save_checkpoint(tmp_path/'c.pt', content)
    assert card_of(tmp_path/'c.pt').data.to_dict().get('license') == licence


# ---- a run -----------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def run(pretraining_on, one_thread, quiet):
    "Made cycles of CirCor, and a small model fine-tuned and evaluated on them."
    folder = pretraining_on({})
    model = {f'model.{k}': v for k, v in TINY.items()}
    finetune(task='circor_murmur', pretrained='none', data_dir=folder/'downstream', epochs=1,
             output_dir=folder/'outputs', **model, **{'training.num_workers': 0})
    best = folder/'outputs'/'circor_murmur_downstream'/'best_model.pt'
    evaluate(best, 'circor_murmur', folder/'downstream', draws=30)
    load_classifier(best)[0].save_pretrained(folder/'saved')
    return folder

def test_the_card_says_what_the_files_say(run):
    card = ModelCard.load(run/'saved'/'README.md')
    outputs = run/'outputs'/'circor_murmur_downstream'
    metrics = json.loads((outputs/'evaluation_circor_murmur_test'/'metrics.json').read_text())
    saved, subject = load_checkpoint(outputs/'best_model.pt'), metrics['levels']['subject']
    expected = {k: v for k, v in subject.items() if type(v) in (int, float) and k != 'n'}
    expected[metrics['official']['name']] = metrics['official']['value']
    assert numbers(card) == expected and len(expected) > 8
    for result in card.data.eval_results:
        assert (result.dataset_config, result.dataset_split) == ('circor_murmur', 'test')
        assert result.metric_args['n'] == metrics['n']['subject']
        ends = subject['intervals'].get(result.metric_type) or [None]
        if result.metric_type == metrics['official']['name']:
            ends = [metrics['official']['low'], metrics['official']['high']]
        assert result.metric_args.get('interval_95') == (None if None in ends else ends)
        assert f'| {result.metric_type} | {result.metric_value:.4f} |' in card.text
    persons = sorted(persons_trained_on(saved))
    assert f'{len(persons)} persons; hash of their ids: `{fingerprint(persons)}`' in card.text
    assert card.data.model_name == 'circor_murmur_downstream' and 'random weights' in card.text
    assert (card.data.license, card.data.datasets) == ('odc-by', ['circor'])
    assert "`{'Present': 0, 'Absent': 1, 'Unknown': 2}`" in card.text
    assert set(persons).isdisjoint(re.findall(r'[\w-]+', card.text))   # nobody's id
    (outputs/'evaluation_circor_murmur_test').rename(outputs/'hidden')
    try: alone = card_of(outputs/'best_model.pt')   # as fine-tuning itself tested it
    finally: (outputs/'hidden').rename(outputs/'evaluation_circor_murmur_test')
    final = json.loads((outputs/'final_metrics.json').read_text())
    assert numbers(alone) == {k[5:]: v for k, v in final.items() if k.startswith('test_')
                              and isinstance(v, float)}

def test_every_command_takes_the_folder(run, tmp_path):
    best = run/'outputs'/'circor_murmur_downstream'/'best_model.pt'
    given = dict(task='circor_murmur', data_dir=run/'downstream', epochs=1, output_dir=tmp_path,
                 linear_eval=True, **{'training.num_workers': 0})
    finetune(pretrained=run/'saved', experiment_name='folder', **given)
    finetune(pretrained=best, experiment_name='file', **given)
    folder, file = (load_checkpoint(tmp_path/f'circor_murmur_{n}'/'best_model.pt')
                    for n in ('folder', 'file'))
    assert folder['training_persons'] == file['training_persons']
    assert all(torch.equal(v, file['model_state_dict'][k])
               for k, v in folder['model_state_dict'].items())
    assert len(_hash_checkpoint(best)) == 1 < len(_hash_checkpoint(run/'saved'))
    assert _pretrained_fingerprint(run/'saved') != _pretrained_fingerprint(best)

def test_an_evaluation_of_a_folder_lies_in_it_and_is_saved_on(run, tmp_path):
    from_pretrained(run/'saved').save_pretrained(tmp_path/'m')
    known = numbers(ModelCard.load(tmp_path/'m'/'README.md'))   # from config.json alone
    evaluate(tmp_path/'m', 'circor_murmur', run/'downstream', draws=30)
    ours, theirs = (json.loads((f/'evaluation_circor_murmur_test'/'metrics.json').read_text())
                    for f in (tmp_path/'m', run/'outputs'/'circor_murmur_downstream'))
    assert ours.pop('checkpoint') != theirs.pop('checkpoint') and ours == theirs
    again = numbers(from_pretrained(tmp_path/'m').generate_model_card())
    assert again == known and len(known) > 8

def test_a_leak_is_found_in_a_folder(run, tmp_path):
    saved = load_checkpoint(run/'saved')
    config = json.loads((run/'downstream'/'circor_murmur'/'task_config.json').read_text())
    someone = config['split_subjects']['test'][0]
    model = load_classifier(run/'saved')[0]
    model.save_pretrained(tmp_path/'m', config=dict(
        training_persons=[*saved['training_persons'], str(someone)]))
    with pytest.raises(PahclError, match='was trained on 1 persons of the validation and test'):
        finetune(task='circor_murmur', pretrained=tmp_path/'m', data_dir=run/'downstream',
                 output_dir=tmp_path, epochs=1)
