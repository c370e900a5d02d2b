"""What the name of a checkpoint's folder tells, and that exports are named so."""
import dataclasses
import datetime

import numpy as np
import pytest

from m2d_clap_jax import weights
from m2d_clap_jax.weights import core, public
from m2d_clap_jax.weights.public import name_fields, text_encoder


@pytest.mark.parametrize('name, expected', [
    ('m2d_clap_vit_base-80x608p16x16-240128', {'input_size': (80, 608), 'patch_size': (16, 16)}),
    ('m2d_vit_base-80x608p16x16p32k-240413_AS-FT', {'input_size': (80, 608), 'patch_size': (16, 16),
                                                    'sample_rate': 32000}),
    ('m2d_s_vit_base-80x400p80x2-230915', {'input_size': (80, 400), 'patch_size': (80, 2)}),
    ('m2d_vit_base-80x200p16x4-230529', {'input_size': (80, 200), 'patch_size': (16, 4)}),
    ('m2d_clap_vit_base-80x1001p16x16p16kpA-250101', {'input_size': (80, 1001), 'patch_size': (16, 16),
                                                      'sample_rate': 16000, 'text_encoder': 'A'}),
    ('m2d_clap_vit_base-80x1001p16x16p16kpBpTI-250101', {'input_size': (80, 1001), 'patch_size': (16, 16),
                                                         'sample_rate': 16000, 'text_encoder': 'B'}),
    ('m2d_clap_vit_base-80x1001p80x2p16kpBpTI-2025', {'input_size': (80, 1001), 'patch_size': (80, 2),
                                                      'sample_rate': 16000, 'text_encoder': 'B'}),
    ('m2d_clap_vit_base-80x608p16x16p16kpQ-250101', {'input_size': (80, 608), 'patch_size': (16, 16),
                                                     'sample_rate': 16000, 'text_encoder': 'Q'}),
    ('checkpoints', {}),
])
def test_folder_names_tell_sizes_rate_and_text_encoder(name, expected):
  assert name_fields(name) == expected


def test_a_text_encoder_that_is_named_brings_its_own_pooling():
  named = [text_encoder('A', name, {'text_width': 768}) for name in (None, 'bert-base-uncased', 'my/encoder')]
  assert [each['pooling'] for each in named] == ['mean', 'cls', 'mean']
  model = {'text_width': 768}
  other = core.overridden(weights.Weights(model, {}, text_encoder=named[0]), {'text_encoder': 'bert-base-uncased'})
  assert other.text_encoder['pooling'] == 'cls'


@pytest.mark.parametrize('about, text, expected', [
    (('thenlper/gte-base', 'mean'), False, ''), (('bert-base-uncased', 'cls'), False, 'p16kpB'),
    (('bert-base-uncased', 'cls'), True, 'p16kpBpTI'), (('my/own', 'mean'), True, 'p16kpApTI'),
    (('nvidia/NV-Embed-v2', 'eos'), False, 'p16kpN'), (('my/own', 'mean'), False, '')])
def test_a_folders_name_leads_back_to_its_text_encoder(about, text, expected):
  encoder = {'name': about[0], 'pooling': about[1], 'hash': None, 'width': 768}
  made = weights.Weights({}, {}, text_encoder=encoder, text={'a': np.zeros(1)} if text else {})
  folder = public.checkpoint_folder(made, datetime.date(2025, 1, 2))
  assert folder == f'm2d_clap_vit_base-80x608p16x16{expected}-250102'
  if 'own' not in about[0]:
    assert text_encoder(name_fields(folder).get('text_encoder', 'A'), None, {'text_width': 768}) == encoder
  assert public.checkpoint_folder(dataclasses.replace(made, sample_rate=32000), datetime.date(2025, 1, 2)).startswith(
      'm2d_clap_vit_base-80x608p16x16p32k')
