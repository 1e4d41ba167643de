"""pahcl.models.bags: pooling against loops, whatever the order and the sizes; drawing that never
leaves a bag
"""
import numpy as np
import pandas as pd
import torch
from hypothesis import given, settings, strategies as st
from pahcl.data.sampling import bag_ids, bag_table, sample_bag_cycles
from pahcl.models.bags import _average_bags, GatedAttention, _softmax_within_bags, _sum_bags
from pahcl.core.basics import generator
from pahcl.models.classifier import Classifier, predict_probabilities
from pahcl.core.predictions import Predictions

sizes = st.lists(st.integers(1, 5), min_size=1, max_size=6)


def made(sizes, seed):
    random = np.random.default_rng(seed)
    bag = random.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return (torch.from_numpy(random.normal(size=(len(bag), 3)).astype('float32')),
            torch.from_numpy(bag))


@given(sizes, st.integers(0, 9))
@settings(deadline=None)
def test_pooling_is_what_a_loop_says(sizes, seed):
    x, bag = made(sizes, seed)
    each = [x[bag == b] for b in range(len(sizes))]
    assert (torch.allclose(_sum_bags(x, bag), torch.stack([e.sum(0) for e in each]), atol=1e-5)
            and torch.allclose(_average_bags(x, bag), torch.stack([e.mean(0) for e in each]),
                               atol=1e-5))
    weights = _softmax_within_bags(50*x[:, 0], bag)
    for b, e in enumerate(each):
        assert torch.allclose(weights[bag == b], (50*e[:, 0]).softmax(0), atol=1e-5)


class Encoder(torch.nn.Module):
    out_dim, config = 3, dict(encoder_type='none')


@given(sizes, st.integers(0, 9), st.sampled_from(['mean', 'attention']))
@settings(deadline=None, max_examples=30)
def test_the_order_of_cycles_does_not_matter(sizes, seed, aggregation):
    """Bags are sets: neither their order nor their neighbours change an answer, and levels are in
    the order of the metrics.
    """
    x, bag = made(sizes, seed)
    torch.manual_seed(seed)
    model = Classifier(Encoder(), 2, hidden_dim=4, aggregation=aggregation, attention_dim=4)
    table = pd.DataFrame(dict(subject_id=[f's{b}' for b in bag.tolist()],
                              recording_id=[f's{b}_{i % 2}' for i, b in enumerate(bag.tolist())],
                              label=0))
    said, order = (predict_probabilities(model, x, table),
                   np.random.default_rng(seed).permutation(len(x)))
    again = predict_probabilities(model, x[order], table.iloc[order])
    for level in ('recording', 'subject'): assert np.allclose(said[level], again[level], atol=1e-5)
    alone = predict_probabilities(model, x[bag == 0], table[(bag == 0).numpy()])
    assert np.allclose(alone['subject'][0], said['subject'][0], atol=1e-5)
    recordings = Predictions(table, said).at_level('recording')
    rows, values = recordings.table, recordings.probabilities
    assert (rows['recording_id'].tolist() == sorted(set(table['recording_id']))
            and np.array_equal(values, said['recording'].astype(float)))


def test_attention_is_the_papers():
    torch.manual_seed(0)
    attend, h = GatedAttention(5, 7), torch.randn(4, 5)
    V, U, w = attend.value, attend.gate, attend.score.weight[0]
    by_hand = [(w @ (torch.tanh(V.weight @ k+V.bias)*torch.sigmoid(U.weight @ k+U.bias))).item()
               for k in h]
    assert torch.allclose(attend(h), torch.tensor(by_hand), atol=1e-6)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=40),
       st.integers(0, 8), st.integers(0, 5))
@settings(deadline=None)
def test_drawing(cells, most, seed):
    "Only own cycles, none twice, as many as there are up to the limit, recordings in turn."
    table = pd.DataFrame([dict(subject_id=f'{s}', recording_id=f'{s}_{r}', label=s % 2)
                          for s, r in cells])
    bag = bag_ids(table)
    rows = sample_bag_cycles(table, bag, most, generator(seed, 'a'))
    count, have = np.bincount(bag[rows], minlength=bag.max()+1), np.bincount(bag)
    assert len(set(rows)) == len(rows) and (count == (
        np.minimum(have, most) if most else have)).all() and (np.diff(bag[rows]) >= 0).all()
    there, drawn = (table['recording_id'].value_counts(),
                    table['recording_id'].iloc[rows].value_counts())
    for s in set(table['subject_id']):
        own = {r: (there[r], drawn.get(r, 0))
               for r in set(table.loc[table['subject_id'] == s, 'recording_id'])}
        # of recordings with cycles left no other has more than one more
        left = [d for t, d in own.values() if d < t]
        assert not left or max(d for _, d in own.values()) <= min(left)+1
    assert bag_table(table)['size'].tolist() == have.tolist() and (
        bag_table(table)['subject_id'].astype(str) == sorted(set(table['subject_id']))).all()
