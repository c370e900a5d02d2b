"""Whether the Hugging Face Hub can be reached, for models and text encoders."""
import threading


def is_silent(seconds: float = 4.0) -> bool:
  """Whether the Hub gives no answer of any kind in that time, or HF_HUB_OFFLINE says not to ask.

  Where names are not resolved or packets are dropped, each of its client's attempts takes tens of seconds to fail.
  """
  from huggingface_hub import constants
  from huggingface_hub.utils import get_session
  if constants.HF_HUB_OFFLINE:
    return True
  answered = []

  def ask():
    try:
      get_session().head(constants.ENDPOINT, timeout=seconds)
    except OSError:  # requests' errors are of this kind
      return
    answered.append(True)
  asking = threading.Thread(target=ask, daemon=True)  # the time in which a name is resolved cannot be limited
  asking.start()
  asking.join(seconds)
  return not answered
