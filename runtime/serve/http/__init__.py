"""What clients see of a serving engine: OpenAI's API, control, metrics, and a live page.

May import `serve.protocol`, never an engine: whatever honours `ServeEngine` can stand behind it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
