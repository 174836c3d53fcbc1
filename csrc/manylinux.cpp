// Own definitions of what newer compilers' headers ask of a libstdc++ or glibc newer than manylinux_2_28's. Nothing
// outside this library sees them: exports.map keeps them local.
#include <new>
#include <sstream>

#ifdef __GLIBCXX__

// Tells libstdc++ whether reference counts may skip atomics. Always 0 here: they never do.
extern "C" char __libc_single_threaded;
char __libc_single_threaded = 0;

namespace std {

[[noreturn]] void __throw_bad_array_new_length() { throw bad_array_new_length(); }

template basic_stringstream<char>::basic_stringstream();
template basic_ostringstream<char>::basic_ostringstream();

}  // namespace std

#endif
