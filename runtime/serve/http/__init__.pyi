from .app import create_app as create_app
from .options import HttpOptions as HttpOptions
from .server import HttpServer as HttpServer
