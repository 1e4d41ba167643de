"""What each part of the window recipe is worth: the recipe without it, out of fold.

python benchmarks/recipe_parts.py WORK [part …] [--epochs 11] [--jobs 2]

WORK holds downstream/circor_murmur, as `pahcl_prepare` leaves it. Every variant trains the same
five folds of the training and validation persons (the test split is not opened), half as long as
the recipe; the decision layer is fitted and asked nested, so each subject is scored by models that
have not met the person. The difference from the whole recipe is paired, its interval is over
persons. 'another seed' says how far apart two runs of the same recipe are: nothing smaller than
that has been shown. Prints a table and writes it to nbs/measured/recipe_parts.csv; a variant that
is there is not trained again.
"""
import argparse, os, time
from pathlib import Path
import numpy as np, pandas as pd, torch
from pahcl.core.metrics import classification_metrics
from pahcl.core.resampling import resampling_weights
from pahcl.evaluation.statistics import bootstrap_scores
from pahcl.models.checkpoints import load_checkpoint
from pahcl.training.finetuning import finetune

PARTS = {
    'the recipe': {},
    'another seed': dict(seed=43),
    'no mixup': {'training.mixup': 0.},
    'no mean of the weights': {'training.ema_decay': 0.},
    'classes as they are': {'training.balance_exponent': 0.},
    'labels by subject': {'training.use_murmur_locations': 'false'},
    'no masks': {'augmentation.spec_augment_probability': 0.},
    'no equaliser': {'augmentation.equaliser_probability': 0.},
    'no noise floor': {'augmentation.noise_floor_probability': 0.},
    'no change of rate': {'augmentation.rate_probability': 0.},
    'group norm': {'model.norm': 'group'},
    'heart states as channels': {'data.state_channels': True},
    'Mamba over frames': {'model.encoder_type': 'cnn_mamba_small'}}
OUT = Path(__file__).resolve().parents[1]/'nbs'/'measured'/'recipe_parts.csv'
OFFICIAL, DRAWS = 'murmur_weighted_accuracy', 1000

def out_of_fold(name, settings, epochs, jobs):
    "Train the folds of a variant; what its checkpoint keeps, and the minutes it took."
    experiment, began = name.replace(' ', '_'), time.time()
    finetune('window', task='circor_murmur', experiment_name=experiment, pretrained='none',
             data_dir='downstream', output_dir='parts', epochs=epochs,
             **{'decision.networks': 'folds', 'decision.jobs': jobs} | settings)
    saved = load_checkpoint(Path('parts', f'circor_murmur_{experiment}', 'best_model.pt'))
    return saved, (time.time()-began)/60

def draw(saved, draws):
    "Each score of a variant: as measured, without each person, and of every draw of persons."
    kept = {level: {k: v.numpy() for k, v in part.items()}
            for level, part in saved['validation'].items()}
    subject, recording = kept['subject'], kept['recording']
    p = subject['probabilities'].astype(float)
    decided = (p*np.asarray(saved['decision_layer']['class_weights'])).argmax(1)
    weights = resampling_weights(subject['person'].max()+1, draws)
    out = bootstrap_scores(subject['label'], p, decided, subject['person'], weights, OFFICIAL)
    heard = recording['probabilities'].astype(float)[:, :1]   # of Present, no layer
    alone = bootstrap_scores((recording['label'] == 0).astype(int), np.hstack([1-heard, heard]),
                             heard[:, 0] > .5, recording['person'], weights)
    return dict(auroc=out['auroc'], official=out[OFFICIAL], uar=out['uar'],
                auroc_recordings=alone['auroc'])

def compare(found, whole):
    "Scores, and their paired differences from the whole recipe with 95 % intervals."
    row, persons = {}, len(found['auroc'])-DRAWS-1
    for name, values in found.items():
        row[name] = round(float(values[0]), 4)
        moved = values-whole[name]
        low, high = np.nanpercentile(moved[1+persons:], [2.5, 97.5])
        row |= {f'{name}_gain': round(float(moved[0]), 4), f'{name}_low': round(float(low), 4),
                f'{name}_high': round(float(high), 4)}
    return row

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('work')
    parser.add_argument('parts', nargs='*')
    parser.add_argument('--epochs', type=int, default=11)
    parser.add_argument('--jobs', type=int, default=2)
    asked = parser.parse_args()
    os.chdir(asked.work)
    torch.set_num_threads(1)
    rows, whole = [], None
    for name in ['the recipe', *(p for p in asked.parts or PARTS if p != 'the recipe')]:
        saved, minutes = out_of_fold(name, PARTS[name], asked.epochs, asked.jobs)
        found = draw(saved, DRAWS)
        whole = whole or found
        rows.append(dict(variant=name, epochs=asked.epochs,
                         subjects=len(saved['validation']['subject']['label']))
                    | compare(found, whole))
        print(f'{name}: {minutes:.1f} minutes', rows[-1], flush=True)
        pd.DataFrame(rows).to_csv(OUT, index=False)
    print(pd.DataFrame(rows).set_index('variant').to_string())
