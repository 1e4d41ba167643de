"""Physiology-aware hierarchical contrastive learning of heart sounds."""
import lazy_loader as lazy

__version__ = "0.1.0"

# Name -> module, read at its first use. No name is called like a module: importing that would hide it.
_API = dict(
    load_recordings='data.recordings', simulate_recording='data.heart_sounds', simulate_dataset='data.simulation',
    segment='segmentation.segmenter', score_states='segmentation.scoring', preprocess='segmentation.preprocessing',
    prepare='data.splitting', Task='data.tasks', Cycles='data.loader',
    build_encoder='models.encoders', from_pretrained='models.encoders', Evaluation='evaluation.report',
    predict='evaluation.prediction')

__getattr__, __dir__, __all__ = lazy.attach(__name__, submod_attrs={m: [n for n in _API if _API[n] == m] for m in _API.values()})
