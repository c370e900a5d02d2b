"""Recordings as phones, browsers and recorders write them."""
import av
import numpy as np


def encode(path, wave, rate, codec='aac', to_rate=None, layout='mono', options=None):
  """Writes wave [S], float32, in the container that the path's ending names."""
  with av.open(str(path), 'w', options=options) as container:
    stream = container.add_stream(codec, rate=to_rate or rate, layout=layout, bit_rate=12200 if codec == 'amr_nb' else 128000)
    frame = av.AudioFrame.from_ndarray(np.stack([wave] * (1 if layout == 'mono' else 2)), format='fltp', layout=layout)
    frame.sample_rate, frame.pts = rate, 0  # with which the encoder states its delay
    resampler = av.AudioResampler(format=stream.codec_context.format, layout=layout, rate=to_rate or rate,
                                  frame_size=stream.codec_context.frame_size or 1024)
    for part in [*resampler.resample(frame), *resampler.resample(None), None]:
      container.mux([packet for packet in stream.encode(part) if packet.size])  # FLAC's last one is empty
