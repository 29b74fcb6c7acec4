// The Python module dino_d2._C. Importing it loads this library, whose static initialisers register
// the operators; the module itself is empty.
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
