"""TFRecord files and the messages in them, tf.train.Example, without TensorFlow, whose import takes seconds."""
import struct

import google_crc32c
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# A record of a TFRecord file: its length (uint64), that length's checksum, the data, the data's checksum.
HEADER, FOOTER = 12, 4


def frame(data: bytes) -> bytes:
  """The record of a file that holds `data`."""
  length = struct.pack('<Q', len(data))
  return b''.join((length, _masked_crc(length), data, _masked_crc(data)))


def intact(record: bytes) -> bool:
  """Whether the length and the checksums that a whole record states are those of its data."""
  length, data = record[:8], record[HEADER:-FOOTER]
  return (struct.unpack('<Q', length)[0] == len(data) and record[8:HEADER] == _masked_crc(length)
          and record[-FOOTER:] == _masked_crc(data))


def _masked_crc(data: bytes) -> bytes:
  """CRC-32C as TFRecord files store it: rotated and shifted, because checksums of checksums are weak."""
  crc = google_crc32c.value(data)
  return struct.pack('<I', ((crc >> 15 | crc << 17) + 0xa282ead8) & 0xffffffff)


def _make_example():
  """The class of tf.train.Example, from TensorFlow's published definition (tensorflow/core/example/example.proto)."""
  Field = descriptor_pb2.FieldDescriptorProto
  file = descriptor_pb2.FileDescriptorProto(name='example.proto', package='tensorflow', syntax='proto3')

  def message(name, *fields):
    return file.message_type.add(name=name, field=fields)

  def field(name, number, kind, repeated=False, **more):
    label = Field.LABEL_REPEATED if repeated else Field.LABEL_OPTIONAL
    if isinstance(kind, str):
      return Field(name=name, number=number, type=Field.TYPE_MESSAGE, type_name=f'.tensorflow.{kind}', label=label, **more)
    return Field(name=name, number=number, type=kind, label=label, **more)

  lists = {'bytes_list': ('BytesList', Field.TYPE_BYTES), 'float_list': ('FloatList', Field.TYPE_FLOAT),
           'int64_list': ('Int64List', Field.TYPE_INT64)}
  for name, kind in lists.values():
    message(name, field('value', 1, kind, repeated=True))
  feature = message('Feature', *(field(name, number, kind, oneof_index=0)
                                 for number, (name, (kind, _)) in enumerate(lists.items(), 1)))
  feature.oneof_decl.add(name='kind')
  features = message('Features', field('feature', 1, 'Features.FeatureEntry', repeated=True))
  entry = features.nested_type.add(name='FeatureEntry', field=[field('key', 1, Field.TYPE_STRING), field('value', 2, 'Feature')])
  entry.options.map_entry = True
  message('Example', field('features', 1, 'Features'))
  pool = descriptor_pool.DescriptorPool()  # of its own: TensorFlow, once imported, has messages of these names in the common one
  pool.Add(file)
  return message_factory.GetMessageClass(pool.FindMessageTypeByName('tensorflow.Example'))


Example = _make_example()
