// Definitions that newer compilers' headers expect from a libstdc++ or glibc newer than that of manylinux_2_28.
// exports.map keeps them local, so nothing outside of this library sees them.
#include <new>
#include <sstream>

#ifdef __GLIBCXX__

// libstdc++ reads this to decide whether reference counts may skip atomics. It stays 0, so they never do.
extern "C" char __libc_single_threaded;
char __libc_single_threaded = 0;

namespace std {

[[noreturn]] void __throw_bad_array_new_length() { throw bad_array_new_length(); }

template basic_stringstream<char>::basic_stringstream();
template basic_ostringstream<char>::basic_ostringstream();

}  // namespace std

#endif
