from qkv.analysis.page.document import frame as frame
from qkv.analysis.page.document import page_of as page_of

__all__ = ["frame", "page_of"]
