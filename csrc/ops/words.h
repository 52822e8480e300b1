// The words that options are given by, and the enumerations they stand for.
#pragma once

#include <string_view>

#include "../kernels.h"

namespace fgbg::ops {

// The word of an option `name`; ValueError, with those there are, if it is none of them.
template <class Word>
Word parse(const char* name, std::string_view text);
template <>
Reduction parse<Reduction>(const char* name, std::string_view text);
template <>
Likelihood parse<Likelihood>(const char* name, std::string_view text);
template <>
Composition parse<Composition>(const char* name, std::string_view text);
template <>
Parameterization parse<Parameterization>(const char* name, std::string_view text);

std::string_view word(Reduction);
std::string_view word(Likelihood);
std::string_view word(Composition);
std::string_view word(Parameterization);

// All words of one kind, quoted and separated by commas.
template <class Word>
std::string words();
template <>
std::string words<Reduction>();
template <>
std::string words<Likelihood>();
template <>
std::string words<Parameterization>();

}  // namespace fgbg::ops
