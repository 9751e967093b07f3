// What the sources were when the library was compiled: lutq/build.py compares it with the sources beside it.
#ifndef LUTQ_SOURCE_HASH
#error "compile with lutq build, or -DLUTQ_SOURCE_HASH=\"...\""
#endif
extern "C" const char* lutq_source_hash() { return LUTQ_SOURCE_HASH; }
