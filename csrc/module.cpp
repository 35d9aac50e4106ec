// The Python module. Names no operator: each registers itself in its own folder when the library is loaded, which is all
// that `import querymask._C` has to do.

#include <Python.h>

#include "build_info.h"

extern "C" PyObject* PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  PyObject* created = PyModule_Create(&module);
  if (created != nullptr) {
    PyModule_AddStringConstant(created, "build_info", querymask::kBuildInfo);
  }
  return created;
}
