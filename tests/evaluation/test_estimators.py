"""The estimators keep scikit-learn's promises, and compute what the pipeline's probe and rules do
"""
import io
from pathlib import Path
import joblib
import numpy as np
import pandas as pd
import pytest
import sklearn
import soundfile
from pahcl import embed, HeartSoundClassifier, segment, simulate_recording
from pahcl.core.basics import PahclError
from pahcl.evaluation import estimators
from pahcl.evaluation.estimators import HeartSoundEmbedder, HeartSoundSegmenter
from pahcl.models.pretrained import load_pretrained_encoder
from pahcl.training.probe import fit_probe
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score, cross_validate, GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks

pytestmark = pytest.mark.usefixtures('one_thread')
ALL = [HeartSoundSegmenter, HeartSoundEmbedder, HeartSoundClassifier]


@pytest.fixture(scope='module')
def table(tmp_path_factory):
    "Eighteen recordings of nine hearts, four of them with a murmur; one has three recordings."
    folder, rows = tmp_path_factory.mktemp('wavs'), []
    for i in range(18):
        heart = min(i//2, 8) if i != 16 else 0
        signal, _ = simulate_recording(2.5, heart_rate=80+4*heart, person=heart, seed=i,
                                       murmur='holosystolic' if heart % 2 else None, noise_db=-15)
        soundfile.write(folder/f'{i:02d}.wav', signal, 4000)
        rows.append(dict(path=str(folder/f'{i:02d}.wav'), heart=heart, location='AM'[i % 2],
                         murmur='Present' if heart % 2 else 'Absent'))
    return pd.DataFrame(rows)


@pytest.fixture(scope='module')
def features(table): return HeartSoundEmbedder().fit_transform(table.path)


@pytest.mark.parametrize('kind', ALL)
def test_what_scikit_learn_asks_of_every_estimator(kind):
    "Those of its checks that need no numbers as input."
    checks = ['check_no_attributes_set_in_init', 'check_parameters_default_constructible',
              'check_get_params_invariance', 'check_set_params', 'check_estimator_repr',
              'check_estimator_cloneable', 'check_do_not_raise_errors_in_init_or_set_param',
              'check_mixin_order', 'check_valid_tag_types', 'check_estimator_tags_renamed']
    found = [c for c in checks if hasattr(estimator_checks, c)]
    assert len(found) > 3
    for name in found: getattr(estimator_checks, name)(kind.__name__, kind())


def test_features_hang_on_the_recording_alone(table, features):
    "Not on company, memory or form; they are those of `embed` but for rounding."
    embedder = HeartSoundEmbedder().fit(table.path)
    assert np.abs(features-embed(table.path)).max() < 1e-5
    assert embedder.get_feature_names_out()[-1] == 'heartsoundembedder95'
    estimators._REMEMBERED.clear()
    for X in ([table.path[3]], table[['path']][3:4], np.array([[table.path[3]]], object)):
        assert np.array_equal(embedder.transform(X), features[3:4])
    signals = [soundfile.read(p, dtype='float32')[0] for p in table.path[:3]]
    embedder.set_params(sample_rate=4000)
    for X in (signals, np.stack(signals)):
        assert np.array_equal(embedder.transform(X), features[:3])
    with joblib.parallel_config('threading', n_jobs=2):
        assert np.array_equal(embedder.transform(table.path[4:8]), features[4:8])


def test_a_recording_is_heard_once(table, features, tmp_path, monkeypatch):
    "In memory under its content, and on disk with `memory`; a changed file is heard again."
    heard = []
    embed_one = estimators._embed_recording
    def count(key, source, name, sample_rate, opened):
        heard.append(source)
        return embed_one(key, source, name, sample_rate, opened)
    monkeypatch.setattr(estimators, '_embed_recording', count)
    monkeypatch.setattr(estimators, '_REMEMBERED', {})
    copy = tmp_path/'copy.wav'
    copy.write_bytes(open(table.path[0], 'rb').read())
    embedder = HeartSoundEmbedder().fit(None)
    X = embedder.transform([table.path[0], table.path[1], copy, table.path[0]])
    assert np.array_equal(X, features[[0, 1, 0, 0]]) and len(heard) == 2
    copy.write_bytes(open(table.path[2], 'rb').read())
    assert np.array_equal(embedder.transform([copy]), features[2:3]) and len(heard) == 3
    kept = HeartSoundEmbedder(memory=str(tmp_path/'memory')).fit(None)
    estimators._REMEMBERED.clear()
    kept.transform(table.path[:2])
    estimators._REMEMBERED.clear()
    assert np.array_equal(kept.transform(table.path[:2]), features[:2]) and len(heard) == 5
    monkeypatch.setattr(estimators, '_MOST_REMEMBERED', 1)
    kept.transform(table.path[:2])
    assert len(estimators._REMEMBERED) == 1


def test_without_groups_it_is_the_probe_of_the_pipeline(table, features):
    y = (table.murmur == 'Present').to_numpy()
    fitted = HeartSoundClassifier().fit(table.path, y)
    expected = fit_probe(features, y, 2)(features)
    assert np.allclose(fitted.predict_proba(table.path), expected, atol=1e-5)
    assert fitted.classes_.tolist() == [False, True] and fitted.predict(table.path).dtype == bool


def test_a_subject_counts_once(table, features):
    "Heart 0 has three recordings; by the weights of an own formula, and by repeating rows."
    fitted = HeartSoundClassifier(C=.3).fit(table.path, table.murmur, groups=table.heart)
    size = table.heart.map(table.heart.value_counts())
    hearts = table.groupby('murmur').heart.nunique()
    own = 1/size
    alike = own*hearts.sum()/(2*table.murmur.map(hearts))
    scaler = StandardScaler().fit(features, sample_weight=own)
    regression = LogisticRegression(C=.3, max_iter=2000).fit(scaler.transform(features),
                                                             table.murmur, sample_weight=alike)
    each = regression.predict_proba(scaler.transform(features))
    assert np.allclose(fitted.predict_proba(table.path), each, atol=1e-6)
    mean = pd.DataFrame(each).groupby(table.heart).transform('mean').to_numpy()
    assert np.allclose(fitted.predict_proba(table.path, table.heart), mean, atol=1e-6)
    decided = fitted.classes_[mean.argmax(1)]
    assert fitted.predict(table.path, groups=table.heart).tolist() == decided.tolist()
    # six times as many rows of everybody, but the heart with three recordings four times: the same
    repeats = (6/size).astype(int)
    rows = table.loc[table.index.repeat(repeats)]
    assert np.allclose(HeartSoundClassifier(C=.3).fit(rows.path, rows.murmur, rows.heart)
                       .predict_proba(table.path), each, atol=1e-4)


def test_in_searches_and_pipelines(table, features):
    X, y, groups = table.path.tolist(), (table.murmur == 'Present').to_numpy(), table.heart
    cv = GroupKFold(3)
    search = GridSearchCV(HeartSoundClassifier(), dict(C=[.001, .1]), cv=cv, scoring='roc_auc')
    search.fit(X, y, groups=groups)
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=.1, class_weight='balanced',
                                                               max_iter=2000))
    expected = cross_val_score(plain, features, y, groups=groups, cv=cv, scoring='roc_auc')
    assert search.cv_results_['mean_test_score'][1] == pytest.approx(expected.mean())
    piped = make_pipeline(HeartSoundEmbedder(), clone(plain))
    assert np.allclose(cross_val_score(piped, X, y, groups=groups, cv=cv, scoring='roc_auc'),
                       expected)
    both = ColumnTransformer([('sound', HeartSoundEmbedder(), 'path'),
                              ('heart', 'passthrough', ['heart'])])
    assert np.array_equal(both.fit_transform(table), np.c_[features, table.heart])
    framed = HeartSoundEmbedder().set_output(transform='pandas').fit_transform(table.path)
    assert np.array_equal(framed.to_numpy(), features)


def test_groups_reach_fit_in_a_cross_validation(table):
    "Without and with scikit-learn's routing of metadata."
    X, y, groups = table.path, table.murmur, table.heart
    scored = cross_validate(HeartSoundClassifier(), X, y, groups=groups, cv=GroupKFold(3),
                            params=dict(groups=groups), return_estimator=True,
                            return_indices=True)
    rows = scored['indices']['train'][0]
    alone = HeartSoundClassifier().fit(X[rows], y[rows], groups[rows])
    coefficients = alone.regression_.coef_
    assert np.array_equal(scored['estimator'][0].regression_.coef_, coefficients)
    unweighted = HeartSoundClassifier().fit(X[rows], y[rows]).regression_.coef_
    assert not np.allclose(unweighted, coefficients)
    with sklearn.config_context(enable_metadata_routing=True):
        asked = HeartSoundClassifier().set_fit_request(groups=True)
        routed = cross_validate(asked, X, y, params=dict(groups=groups), cv=GroupKFold(3),
                                return_estimator=True)
        assert np.array_equal(routed['estimator'][0].regression_.coef_, coefficients)
        search = GridSearchCV(asked, dict(C=[.1]), cv=GroupKFold(3)).fit(X, y, groups=groups)
        assert np.array_equal(search.best_estimator_.regression_.coef_,
                              HeartSoundClassifier().fit(X, y, groups).regression_.coef_)


@pytest.mark.parametrize('encoder', ['packaged', 'module'])
def test_pickled_and_cloned(table, encoder, monkeypatch):
    if encoder == 'module': encoder = load_pretrained_encoder('packaged').encoder
    fitted = HeartSoundClassifier(encoder).fit(table.path, table.murmur)
    said = fitted.predict_proba(table.path)
    file = io.BytesIO()
    joblib.dump(fitted, file)
    file.seek(0)
    # nothing is remembered where it is opened
    monkeypatch.setattr(estimators, '_REMEMBERED', {})
    assert np.array_equal(joblib.load(file).predict_proba(table.path), said)
    again = clone(fitted).fit(table.path, table.murmur)
    assert np.array_equal(again.predict_proba(table.path), said)
    with pytest.raises(NotFittedError): clone(fitted).predict(table.path)


def test_another_encoder_in_the_same_place(table, tmp_path):
    encoder = load_pretrained_encoder('packaged').encoder
    encoder.save_pretrained(tmp_path/'mine')
    fitted = HeartSoundClassifier(tmp_path/'mine').fit(table.path[:4], table.murmur[:4])
    fitted.predict(table.path[:1])
    next(encoder.parameters()).data.mul_(2)
    encoder.save_pretrained(tmp_path/'mine')
    with pytest.raises(PahclError, match='another than it was at fit'):
        fitted.predict(table.path[:1])


def test_segmenter(table):
    segmenter = HeartSoundSegmenter(sample_rate=4000)
    signal = soundfile.read(table.path[0], dtype='float32')[0]
    of_file, of_signal = segmenter.fit_transform([table.path[0], signal])
    assert of_file.equals(segment(signal, 4000)) and of_signal.equals(of_file)
    samples, same = segmenter.predict([table.path[0], signal])
    assert np.array_equal(samples, same) and len(samples) == len(signal)
    for row in of_file.itertuples():
        inside = samples[int(np.ceil(4000*row.start_s)):int(4000*row.end_s)]
        assert (inside == row.state).all()


def test_what_is_wrong_is_named(table):
    X, y, classifier = table.path[:4].tolist(), [0, 1, 0, 1], HeartSoundClassifier()
    faults = [(([], []), 'no recordings'), ((X[0], [1]), 'give a list'),
              ((X, y[:3]), 'y has shape'), ((X, [0, 0, 0, 0]), 'one class only, 0'),
              ((X, [0, 1, None, 1]), 'y is not known of recording 2'),
              ((X, y, ['a', 'b']), 'groups has shape'),
              ((X, y, ['a', 'b', np.nan, 'c']), 'groups is not known of recording 2'),
              (([*X[:3], 'gone.wav'], y), 'gone.wav'),
              (([*X[:3], np.zeros(9999)], y), 'recording 3: the sample_rate'),
              ((table[:4], y), '4 columns')]
    for given, said in faults:
        with pytest.raises(PahclError, match=said): classifier.fit(*given)
    with pytest.raises(ValueError, match='continuous'): classifier.fit(X, [.1, .2, .3, .4])
    fitted = classifier.fit(X, y)
    with pytest.raises(PahclError, match='groups has shape'): fitted.predict_proba(X, ['a'])
    with pytest.raises(PahclError, match='gone/best_model.pt'):
        HeartSoundEmbedder('gone/best_model.pt').fit(X)


def test_workers_that_stand_in_another_folder(table, features, tmp_path, monkeypatch):
    "Paths are relative to where the caller stands, not to where the workers were started."
    monkeypatch.chdir(tmp_path)
    joblib.Parallel(2)(joblib.delayed(str)(i) for i in range(4))   # they are kept for later calls
    folder = Path(table.path[0]).parent
    monkeypatch.chdir(folder)
    monkeypatch.setattr(estimators, '_REMEMBERED', {})
    few = [Path(p).name for p in table.path[:3]]
    assert np.allclose(HeartSoundEmbedder(n_jobs=2).fit_transform(few), features[:3])
    assert len(HeartSoundSegmenter(n_jobs=2).fit_transform(few)) == 3
    assert len(embed(few, num_workers=2)) == 3
