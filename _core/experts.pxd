from .call cimport Worker
from .model cimport Layer

cdef void mixture(Worker* w, const Layer* layer) noexcept nogil
