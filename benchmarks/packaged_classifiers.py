"""Make the packaged classifiers: python benchmarks/packaged_classifiers.py RAW WORK [task ...]

RAW holds the public data sets in their native layouts, as `pahcl_download` leaves them; WORK gets
cycles, tasks, runs and evaluations. A stage that is done is not repeated, one that was killed goes
on. Each task is fine-tuned from the packaged encoder in the ways of TRIED; the validation split
chooses one of them, which is evaluated on the test split and written to
pahcl/parameters/<task>.pt, with <task>.json: from whom it learnt, what was tried, how it was
tested. The settings are small: circor_murmur trains 11 CPU minutes, the others less. The same data
and processor give the same bytes.
"""
import os
import sys
os.environ['OMP_NUM_THREADS'] = '1'
from pathlib import Path

import torch
from pahcl.core.basics import write_json
from pahcl.data.datasets import DATASETS, TASKS
from pahcl.data.loader import Cycles
from pahcl.data.splitting import prepare
from pahcl.evaluation.evaluator import evaluate
from pahcl.models.checkpoints import load_checkpoint, persons_trained_on
from pahcl.models.model_card import _summarize_evaluation
from pahcl.models.packaged import _save_packaged, _strip_to_classifier
from pahcl.segmentation.preprocessing import preprocess
from pahcl.training.finetuning import finetune

VARIANTS = dict(cycles={}, phases={'classifier.pooling': 'phases'},
                attention={'training.aggregation': 'attention'},
                few_cycles={'training.cycles_per_recording': 3})
TRIED = dict(circor_murmur=['cycles'], circor_outcome=['cycles'],
             physionet2016=['cycles'], pascal=['cycles'])
EPOCHS = dict(circor_murmur=10, circor_outcome=10, physionet2016=10, pascal=10)
SHOWN = ('accuracy', 'f1_macro', 'auroc', 'auprc', 'sensitivity', 'specificity')
PACKAGE = Path(__file__).resolve().parents[1]/'pahcl'/'parameters'

def made_cycles(raw, workers=2):
    "Cut all recordings and split them by person with seed 42."
    if not Path('processed/processing_stats.json').exists():
        preprocess(raw, 'processed', num_workers=workers)
    if not all(Path('downstream', t, 'task_config.json').exists() for t in TRIED):
        prepare('all', raw, 'processed', 'downstream')

def tuned(task, variant):
    "Fine-tune in one way; what `final_metrics.json` says of its validation."
    metrics = finetune('small_finetune', task=task, experiment_name=variant,
                       epochs=EPOCHS[task], pretrained='packaged', data_dir='downstream',
                       output_dir='outputs', **VARIANTS[variant])
    kept = metrics['primary_metric'], 'auroc'
    return dict(variant=variant, settings=VARIANTS[variant], epochs=metrics['epochs'],
                epoch=metrics['best_epoch'],
                validation={k: round(metrics[f'validation_{k}'], 4) for k in kept})

def split_sizes(task):
    "Persons, subjects, recordings and cycles of each split."
    units = dict(persons='person_id', subjects='subject_id', recordings='recording_id')
    tables = {s: Cycles.from_task(Path('downstream', task), s).table
              for s in ('train', 'val', 'test')}
    return {s: {k: int(t[c].nunique()) for k, c in units.items()} | dict(cycles=len(t))
            for s, t in tables.items()}

def tested(results, level):
    "What a card says of a level of a metrics.json; intervals are 95 %, over persons."
    card, official = _summarize_evaluation(results, level), (results['official'] or {}).get('name')
    metrics = {k: round(float(card['metrics'][k]), 4) for k in (*SHOWN, official)
               if k in card['metrics']}
    intervals = {k: [round(float(v), 4) for v in card['intervals'][k]] for k in metrics
                 if k in card['intervals']}
    return card | dict(threshold='argmax', metrics=metrics, intervals=intervals)

def make(task, raw):
    "Fine-tune, choose on validation, test the chosen one, write the two files."
    known, primary = TASKS[task], TASKS[task].primary_metric
    tried = [tuned(task, variant) for variant in TRIED[task]]
    chosen = max(tried, key=lambda t: t['validation'][primary])['variant']
    path = Path('outputs', f'{task}_{chosen}', 'best_model.pt')
    results = evaluate(path, task, 'downstream', 'test', Path('outputs', f'{task}_tested'),
                       raw_dir=raw)
    saved, source = _strip_to_classifier(load_checkpoint(path)), DATASETS[known.dataset].source
    _save_packaged(PACKAGE/f'{task}.pt', saved)
    trained = ('the packaged encoder, and the training persons of the seed-42 split, '
               f'{len(persons_trained_on(saved))} in all')
    write_json(PACKAGE/f'{task}.json', dict(
        task=task, label_map=known.label_map, dataset=known.dataset, title=source.title,
        licence=source.licence, credit=source.credit, made_by=f'benchmarks/{Path(__file__).name}',
        trained_on=trained, encoder_type=saved['encoder_type'], epoch=saved['epoch'],
        parameters=sum(v.numel() for v in saved['model_state_dict'].values()),
        splits=split_sizes(task), chosen_by=f'{primary} of the subjects of the validation split',
        tried=tried, chosen=chosen,
        test={level: tested(results, level) for level in ('recording', 'subject')},
        notes=results['notes']))

if __name__ == '__main__':
    if len(sys.argv) < 3: sys.exit(__doc__)
    raw, work, tasks = Path(sys.argv[1]).resolve(), Path(sys.argv[2]), sys.argv[3:] or list(TRIED)
    work.mkdir(parents=True, exist_ok=True)
    os.chdir(work)   # a checkpoint keeps the paths of its run: relative ones are alike everywhere
    torch.set_num_threads(1)
    made_cycles(raw)
    for task in tasks: make(task, raw)
