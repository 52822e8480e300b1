#include "words.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <iterator>
#include <string>

#include "../math/likelihood.h"

namespace fgbg::ops {
namespace {

constexpr std::string_view kReductions[] = {"none", "sample", "batchmean", "sum", "mean"};
#define FGBG_NAME(L, text) text,
constexpr std::string_view kLikelihoods[] = {FGBG_FOR_EACH_LIKELIHOOD(FGBG_NAME)};
#undef FGBG_NAME
constexpr std::string_view kCompositions[] = {"masked", "blended", "mixture_joint", "mixture_independent",
                                              "plain"};
constexpr std::string_view kParameterizations[] = {"logvar", "log_std", "std"};

template <size_t N>
std::string joined(const std::string_view (&all)[N]) {
  std::string text;
  for (const std::string_view word : all) text += (text.empty() ? "'" : ", '") + std::string(word) + "'";
  return text;
}

template <class Word, size_t N>
Word find(const std::string_view (&all)[N], const char* name, std::string_view text) {
  const auto found = std::find(std::begin(all), std::end(all), text);
  TORCH_CHECK_VALUE(found != std::end(all), name, " is '", text, "', expected one of ", joined(all));
  return static_cast<Word>(found - std::begin(all));
}

}  // namespace

template <>
Reduction parse<Reduction>(const char* name, std::string_view text) {
  return find<Reduction>(kReductions, name, text);
}
template <>
Likelihood parse<Likelihood>(const char* name, std::string_view text) {
  return find<Likelihood>(kLikelihoods, name, text);
}
template <>
Composition parse<Composition>(const char* name, std::string_view text) {
  return find<Composition>(kCompositions, name, text);
}

template <>
Parameterization parse<Parameterization>(const char* name, std::string_view text) {
  return find<Parameterization>(kParameterizations, name, text);
}

std::string_view word(Reduction x) { return kReductions[static_cast<size_t>(x)]; }
std::string_view word(Likelihood x) { return kLikelihoods[static_cast<size_t>(x)]; }
std::string_view word(Composition x) { return kCompositions[static_cast<size_t>(x)]; }
std::string_view word(Parameterization x) { return kParameterizations[static_cast<size_t>(x)]; }

template <>
std::string words<Reduction>() {
  return joined(kReductions);
}
template <>
std::string words<Likelihood>() {
  return joined(kLikelihoods);
}
template <>
std::string words<Parameterization>() {
  return joined(kParameterizations);
}

}  // namespace fgbg::ops
